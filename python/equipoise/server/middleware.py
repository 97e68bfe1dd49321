"""What every request passes: a bounded wait for it, a check of its host, an id that its answer carries back."""

from __future__ import annotations

import asyncio
import ipaddress
import uuid

import h11
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from equipoise.admin.http_errors import error_body

REQUEST_ID_HEADER = "x-request-id"
_MAX_ID_CHARACTERS = 128
_HALF_OPEN_SECONDS = 20.0
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


class RequestId:
    """Send ``x-request-id`` with every answer: the client's own, or a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        identity = given if 0 < len(given) <= _MAX_ID_CHARACTERS and given.isprintable() else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = identity
            await send(message)

        return await self._app(scope, receive, send_with_id)


class PatientH11(H11Protocol):
    """uvicorn's HTTP/1.1 connection, closed when a request that has begun, or was never sent, stays away too long.

    uvicorn bounds the time between two requests only: a half-open connection would hold its socket for ever.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._received_at = self.loop.time()
        self._check = self.loop.call_later(_HALF_OPEN_SECONDS, self._close_half_open)

    def data_received(self, data: bytes) -> None:
        self._received_at = self.loop.time()
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._check.cancel()
        super().connection_lost(exc)

    def _close_half_open(self) -> None:
        incomplete = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if incomplete and self.loop.time() - self._received_at >= _HALF_OPEN_SECONDS - 0.5:
            self.transport.close()
            return
        self._check = self.loop.call_later(_HALF_OPEN_SECONDS, self._close_half_open)


class LoopbackHosts:
    """Refuse requests whose ``Host`` is no name of this machine, where the server listens on loopback.

    A web page can point a name of its own at 127.0.0.1 (DNS rebinding); its requests then pass for ones of the same
    origin, and give themselves away by their Host header alone.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app = app
        self._names = _LOOPBACK_NAMES | {host.lower(), f"[{host.lower()}]"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host", "").lower()
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name not in self._names:
                complaint = f"no host {name!r} here; the server listens on loopback"
                body = error_body(complaint, "MisdirectedRequest", "host", 421)
                return await JSONResponse(body, 421)(scope, receive, send)
        return await self._app(scope, receive, send)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``; False if that cannot be known."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
