"""What the server asks of an engine, and commands that end with the server or with an engine that is silent.

``equipoise.engine.engine.Engine`` is such an engine; tests hand in smaller ones.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any, Protocol

from equipoise.admin.http_errors import HttpError
from equipoise.engine.requests import GenerateRequest, TokenEvent
from equipoise.manager.commands import Command, GetStatus, Rebalance, StatusReply

SILENT_SECONDS = 2.0
"""Without a sign of life, after which questions are answered from what is known."""


class ServingEngine(Protocol):
    """An engine that generates tokens and takes an operator's commands."""

    tokenizer: Any
    """A transformers tokenizer."""

    eos_token_ids: tuple[int, ...]
    """Tokens that end an answer."""

    max_model_len: int
    """Tokens of a request, prompt and answer together."""

    vocab_size: int
    """Token ids are below it."""

    @property
    def error(self) -> str | None:
        """Why the engine is dead; None while it lives."""

    @property
    def silent_seconds(self) -> float:
        """Time since all ranks together last showed that they make progress; 0 while they do."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        """New tokens as they come; the last event carries a finish reason. ConfigError for a request that cannot be."""

    async def abort(self, rid: str) -> None:
        """Forgets a request. One that is unknown or finished is none of its business."""

    async def control(self, command: Command[Any]) -> Any:
        """The reply of rank 0, or the EquipoiseError that it raised."""


class EngineControl:
    """Bring commands to an engine; none waits for an engine that is silent, or for longer than the server lives."""

    def __init__(self, engine: ServingEngine) -> None:
        self._engine = engine
        self._closing = asyncio.Event()
        self._last_status: StatusReply | None = None

    async def __call__(self, command: Command[Any]) -> Any:
        """Have a command carried out.

        Returns:
            The engine's reply; for GetStatus of a silent engine the last one known, which says so in ``error``.

        Raises:
            HttpError: 503, the server closes, or the engine gives no sign of life.
            EquipoiseError: what the command failed with.
        """
        work = asyncio.ensure_future(self._engine.control(command))
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            while not work.done():
                await asyncio.wait({work, closing}, timeout=0.25, return_when=asyncio.FIRST_COMPLETED)
                if work.done():
                    break
                if closing.done():
                    raise HttpError(
                        503, "the server shuts down before this came to an end; see its log", kind="ShuttingDown"
                    )
                if self._engine.silent_seconds > SILENT_SECONDS and not isinstance(command, Rebalance):
                    return self._of_silent(command)
            reply = work.result()
        finally:
            closing.cancel()
            work.cancel()
        if isinstance(reply, StatusReply):
            self._last_status = reply
        return reply

    def _of_silent(self, command: Command[Any]) -> Any:
        silence = f"the engine has given no sign of life for {self._engine.silent_seconds:.0f} s"
        if isinstance(command, GetStatus) and self._last_status is not None:
            return dataclasses.replace(self._last_status, error=f"{silence}; this is what was known before")
        raise HttpError(503, silence, kind="EngineSilent")

    def close(self) -> None:
        """End what is under way with 503; commands go on in the engine as far as it lives."""
        self._closing.set()
