"""Which key a route needs. A route's class says it, so a new route on a keyed router cannot forget to ask."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request, Response, Security, params
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from equipoise.admin.http_errors import HttpError
from equipoise.config import HttpConfig

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class ApiKeyRoute(APIRoute):
    """Needs ``Authorization: Bearer KEY`` when --api-key is set. Asked before the body is read."""

    def get_route_handler(self) -> Handler:
        handler = super().get_route_handler()

        async def checked(request: Request) -> Response:
            http: HttpConfig = request.app.state.config.http
            require_key(request, http.api_key, "--api-key")
            return await handler(request)

        return checked


class AdminKeyRoute(APIRoute):
    """Needs the admin key when --admin-api-key is set, else the API key when that is."""

    def get_route_handler(self) -> Handler:
        handler = super().get_route_handler()

        async def checked(request: Request) -> Response:
            http: HttpConfig = request.app.state.config.http
            if http.admin_api_key is not None:
                require_key(request, http.admin_api_key, "--admin-api-key")
            else:
                require_key(request, http.api_key, "--api-key")
            refuse_foreign_page(request)
            return await handler(request)

        return checked


def documented_key(http: HttpConfig, *, admin: bool) -> list[params.Depends]:
    """Dependencies that tell OpenAPI of the key which :class:`ApiKeyRoute` or :class:`AdminKeyRoute` asks for.

    They refuse nothing: FastAPI would read the body before them. Empty where no key is asked for.
    """
    if admin and http.admin_api_key is not None:
        return [Security(HTTPBearer(scheme_name="AdminKey", description="--admin-api-key", auto_error=False))]
    if http.api_key is not None:
        return [Security(HTTPBearer(scheme_name="ApiKey", description="--api-key", auto_error=False))]
    return []


def require_key(request: Request, key: str | None, option: str) -> None:
    """
    Raises:
        HttpError: 401 without a bearer token, 403 with another one than ``key``. Nothing is asked if that is None.
    """
    if key is None:
        return
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise HttpError(
            401,
            f"send the key given with {option}: Authorization: Bearer KEY",
            kind="Unauthorized",
            field="authorization",
        )
    # Headers arrive as latin-1; the key compares as the bytes a client would have sent for it.
    if not hmac.compare_digest(token.strip().encode("latin-1"), key.encode()):
        raise HttpError(403, f"the key is not the one given with {option}", kind="Forbidden", field="authorization")


def refuse_foreign_page(request: Request) -> None:
    """A browser that shows somebody else's page can reach loopback, and says so in ``Origin``: not with admin calls.

    Raises:
        HttpError: 403.
    """
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise HttpError(403, "admin calls are not taken from pages of another origin", kind="Forbidden", field="origin")
