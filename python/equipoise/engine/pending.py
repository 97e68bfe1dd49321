"""Calls that wait for the engine: streams of requests and replies to commands, each in the event loop that made it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from dataclasses import dataclass

from equipoise.engine.messages import Reply, Tokens
from equipoise.errors import ConfigError, EngineDeadError


@dataclass
class Pending:
    """A call that waits for messages of the engine, in the event loop that made it."""

    loop: asyncio.AbstractEventLoop
    inbox: asyncio.Queue[object]

    @classmethod
    def here(cls) -> Pending:
        return cls(asyncio.get_running_loop(), asyncio.Queue())

    def put(self, item: object) -> None:
        with contextlib.suppress(RuntimeError):  # its loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(self.inbox.put_nowait, item)


class PendingCalls:
    """Hand what comes from the engine to whom it is for, and its death to everyone. Thread-safe.

    Attributes:
        error: why the engine is dead; None while it lives.
    """

    def __init__(self) -> None:
        self.error: str | None = None
        self._lock = threading.Lock()  # guards who waits, and error; never held while sending
        self._streams: dict[str, Pending] = {}
        self._calls: dict[int, Pending] = {}
        self._num_calls = 0

    def require_alive(self) -> None:
        """
        Raises:
            EngineDeadError: the engine is dead.
        """
        if self.error is not None:
            raise EngineDeadError(self.error)

    def open_stream(self, rid: str) -> Pending:
        """Register a request.

        Raises:
            ConfigError: ``rid`` is in use.
            EngineDeadError: the engine is dead.
        """
        stream = Pending.here()
        with self._lock:
            self.require_alive()
            if rid in self._streams:
                raise ConfigError(f"rid {rid!r} names a request that is running", field="rid")
            self._streams[rid] = stream
        return stream

    def close_stream(self, rid: str) -> None:
        with self._lock:
            self._streams.pop(rid, None)

    def open_call(self) -> tuple[int, Pending]:
        """Register a command: its number and who waits for the reply.

        Raises:
            EngineDeadError: the engine is dead.
        """
        call = Pending.here()
        with self._lock:
            self.require_alive()
            self._num_calls += 1
            self._calls[self._num_calls] = call
            return self._num_calls, call

    def close_call(self, call_id: int) -> None:
        with self._lock:
            self._calls.pop(call_id, None)

    def hand_out(self, message: Tokens | Reply) -> None:
        """Give tokens to their streams, a reply to its call; what nobody waits for any more is dropped."""
        with self._lock:
            if isinstance(message, Reply):
                pairs: list[tuple[Pending | None, object]] = [(self._calls.get(message.call_id), message.value)]
            else:
                pairs = [(self._streams.get(event.rid), event) for event in message.events]
        for pending, item in pairs:
            if pending is not None:
                pending.put(item)

    def fail(self, reason: str) -> None:
        """Declare the engine dead, for the first reason given, and tell everyone who waits."""
        with self._lock:
            self.error = self.error or reason
            for pending in [*self._streams.values(), *self._calls.values()]:
                pending.put(EngineDeadError(self.error))
