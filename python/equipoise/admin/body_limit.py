"""A request body may not grow without end: nobody's memory is a client's to fill."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from equipoise.admin.http_errors import error_body

MAX_BODY_BYTES = 32 * 2**20


class BodyLimit:
    """Answers 413 to a body above ``max_bytes``, announced or not."""

    def __init__(self, app: ASGIApp, max_bytes: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        complaint = f"the body is above {self._max_bytes} bytes"
        if _announced_bytes(scope) > self._max_bytes:
            refusal = JSONResponse(error_body(complaint, "ConfigError", "body", 413), 413, {"Connection": "close"})
            await refusal(scope, receive, send)
            return
        received = 0

        async def counted_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise HTTPException(413, complaint, {"Connection": "close"})
            return message

        await self._app(scope, counted_receive, send)


def _announced_bytes(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0
