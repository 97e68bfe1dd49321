"""Exceptions to HTTP answers: ``{"error": {"message", "type", "field"}}`` and a status that says whose fault it was."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from equipoise.errors import ConfigError, EngineDeadError, EquipoiseError, InvalidInputError, PhaseError, StorageError

Obituary = Callable[[], str | None]
"""Why the engine behind the routes is dead; None while it lives."""

_SHOWN_CHARACTERS = 80

UNION_TAGS = frozenset({"(one)", "(batch)"})
"""Names that pydantic puts into the path of a field of more than one shape; no client ever wrote them."""


class ErrorDetail(BaseModel):
    """What went wrong. ``field`` comes as ``param`` too, and the status as ``code``: OpenAI's clients look there."""

    message: str
    type: str
    field: str | None
    param: str | None
    code: int


class ErrorAnswer(BaseModel):
    """The one shape in which every error leaves the server, in an answer or inside a stream."""

    error: ErrorDetail


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "model": ErrorAnswer,
        "description": "The request is at fault: 400 a field, 401 and 403 the key, 404 the name, 409 not in this phase,"
        " 413 too large, 421 the host, 429 too many requests wait",
    },
    "5XX": {
        "model": ErrorAnswer,
        "description": "The server is: 500 an error inside, 503 the engine is dead, silent or shuts down,"
        " 504 the time allowed has passed, 507 the disk is full",
    },
}
"""What OpenAPI says of every route's errors."""


class HttpError(EquipoiseError):
    """An answer that is known before the engine is asked: a missing key, an unknown model."""

    def __init__(self, status: int, message: str, *, kind: str, field: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.field = field


class ClientLeft(EquipoiseError):
    """The client closed its connection; the answer reaches nobody."""


def shown(value: object) -> str:
    """``value`` as an error message shows it: printable and short."""
    text = ascii(value) if isinstance(value, str) else repr(value)
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def error_body(message: str, kind: str, field: str | None = None, code: int = 400) -> dict[str, Any]:
    """An :class:`ErrorAnswer` as JSON has it."""
    name = None if field is None else _printable(field)
    detail = ErrorDetail(message=_printable(message), type=kind, field=name, param=name, code=code)
    return ErrorAnswer(error=detail).model_dump()


def body_and_status(error: EquipoiseError, obituary: str | None = None) -> tuple[dict[str, Any], int]:
    """Body and status that tell a client about ``error``.

    Args:
        obituary: why the engine is dead; None while it lives.
    """
    kind = type(error).__name__
    if isinstance(error, HttpError):
        return error_body(str(error), error.kind, error.field, error.status), error.status
    if isinstance(error, InvalidInputError):
        return error_body(str(error), kind, error.field), 400
    if isinstance(error, PhaseError):
        return error_body(str(error), kind, code=409), 409
    if isinstance(error, StorageError):
        return error_body(str(error), kind, code=507), 507
    if isinstance(error, ClientLeft):
        return error_body(str(error), kind, code=499), 499  # nginx's "client closed request"; nobody reads it
    if isinstance(error, EngineDeadError) or obituary is not None:
        return error_body(f"the engine is dead: {obituary or error}", "EngineDeadError", code=503), 503
    return error_body(str(error), kind, code=500), 500


def answer_error(error: EquipoiseError, obituary: str | None = None) -> JSONResponse:
    """Response to ``error``, as :func:`body_and_status` has it."""
    body, status = body_and_status(error, obituary)
    return JSONResponse(body, status, headers={"WWW-Authenticate": "Bearer"} if status == 401 else None)


def answer_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
    """Response 400 to a body or a query that pydantic refused."""
    failure = validation_failure(error.errors(), request.headers.get("content-type"))
    return JSONResponse(error_body(str(failure), "ConfigError", failure.field), status_code=400)


def install_error_handlers(app: FastAPI, obituary: Obituary) -> None:
    """Every exception of the tree in equipoise.errors, and of FastAPI, answers in the shape of :func:`error_body`.

    For an application of ours. In another's, whose handlers are its own, routes answer by :class:`ErrorAnsweringRoute`.
    """

    async def on_equipoise_error(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, EquipoiseError)
        return answer_error(error, obituary())

    async def on_validation_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return answer_validation_error(request, error)

    async def on_http_exception(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        body = error_body(str(error.detail), "HttpError", code=error.status_code)
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)

    async def on_mistake_of_ours(_request: Request, _error: Exception) -> JSONResponse:
        body = error_body("an error inside Equipoise; the server's log has its traceback", "InternalError", code=500)
        return JSONResponse(body, status_code=500)

    app.add_exception_handler(Exception, on_mistake_of_ours)
    app.add_exception_handler(EquipoiseError, on_equipoise_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(HTTPException, on_http_exception)


class ErrorAnsweringRoute(APIRoute):
    """Answers its own errors, for a router in an application that knows nothing of ours (SGLang's, vLLM's)."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def answered(request: Request) -> Response:
            try:
                return await handler(request)
            except EquipoiseError as error:
                return answer_error(error)
            except RequestValidationError as error:
                return answer_validation_error(request, error)

        return answered


def validation_failure(errors: Sequence[Any], content_type: str | None = None) -> ConfigError:
    """The first of pydantic's complaints as one sentence with the field's path and the value found there."""
    first = errors[0]
    place, *path = first["loc"] or ("body",)
    steps = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in path if part not in UNION_TAGS]
    field = _printable("".join(steps).lstrip("."))[:_SHOWN_CHARACTERS] or str(place)
    found = first.get("input")
    if first["type"] == "json_invalid":
        return ConfigError(f"the body is not valid JSON: {first.get('ctx', {}).get('error', '')}", field="body")
    if first["type"] == "missing":
        what = "the request needs a JSON body" if field == "body" else f"{field} is missing"
        return ConfigError(what, field=field)
    if first["type"] == "extra_forbidden":
        return ConfigError(f"unknown field '{field}' with value {shown(found)}", field=field)
    if field == "body" and "json" not in (content_type or ""):
        return ConfigError("the body must be JSON, sent with the header Content-Type: application/json", field="body")
    message = str(first["msg"]).removeprefix("Value error, ")
    return ConfigError(f"{field}: {message}, got {shown(found)}", field=field)


def _printable(text: str) -> str:
    """``text`` without what UTF-8 cannot carry (half of a surrogate pair in a client's field name)."""
    return text.encode("utf-8", "backslashreplace").decode()
