"""What the server asks of an engine. ``equipoise.engine.engine.Engine`` has it; tests hand in smaller ones."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

from equipoise.engine.requests import GenerateRequest, TokenEvent
from equipoise.manager.commands import Command


class ServingEngine(Protocol):
    """An engine that generates tokens and takes an operator's commands."""

    tokenizer: Any
    """A transformers tokenizer."""

    eos_token_ids: tuple[int, ...]
    """Tokens that end an answer."""

    @property
    def error(self) -> str | None:
        """Why the engine is dead; None while it lives."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        """New tokens as they come; the last event carries a finish reason. ConfigError for a request that cannot be."""

    async def abort(self, rid: str) -> None:
        """Forgets a request. One that is unknown or finished is none of its business."""

    async def control(self, command: Command) -> Any:
        """The reply of rank 0, or the EquipoiseError that it raised."""
