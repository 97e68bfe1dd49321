"""Engine: launches the embedded engine and gives asyncio programs access to it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from equipoise.config import ServeConfig
from equipoise.engine.checkpoint.files import load_tokenizer, model_directory
from equipoise.engine.messages import (
    Abort,
    Control,
    Died,
    Ended,
    Ready,
    Reply,
    Started,
    Stop,
    Submit,
    ToEngine,
    Tokens,
)
from equipoise.engine.processes import CLOSE_SECONDS, EngineProcesses
from equipoise.engine.requests import GenerateRequest, TokenEvent
from equipoise.errors import ConfigError, EngineDeadError, EquipoiseError
from equipoise.manager.commands import Command


@dataclass
class _Waiting:
    """A call that waits for messages of the engine, in the event loop that made it."""

    loop: asyncio.AbstractEventLoop
    inbox: asyncio.Queue[object]

    def put(self, item: object) -> None:
        with contextlib.suppress(RuntimeError):  # its loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(self.inbox.put_nowait, item)


class Engine:
    """A running engine: a supervisor process and ``ep_size`` ranks below it. Made by :meth:`launch`.

    Attributes:
        config: as it was launched.
        tokenizer: transformers' tokenizer of the model.
        max_model_len: tokens a request may have, prompt and answer together.
        eos_token_ids: tokens that end an answer.
        weight_bytes: bytes of weights that each rank read.
        worker_pids: process ids of the ranks.
        error: why the engine is dead; None while it lives.
    """

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.tokenizer: Any = None
        self.max_model_len = config.engine.max_model_len
        self.vocab_size = 0
        self.eos_token_ids: tuple[int, ...] = ()
        self.weight_bytes: tuple[int, ...] = ()
        self.worker_pids: tuple[int, ...] = ()
        self.error: str | None = None
        self._books = threading.Lock()  # guards who waits, and error; never held while sending
        self._streams: dict[str, _Waiting] = {}
        self._calls: dict[int, _Waiting] = {}
        self._num_calls = 0
        self._reader: threading.Thread | None = None
        self._processes = EngineProcesses(config)

    @classmethod
    def launch(cls, config: ServeConfig, on_progress: Callable[[str], None] | None = None) -> Engine:
        """Starts all processes and returns once every rank can serve.

        Args:
            on_progress: called with a line for each stage of starting.

        Raises:
            InvalidInputError: an option or the model cannot be used.
            EngineDeadError: a rank died while starting.
        """
        directory = model_directory(config.engine.model_path)
        engine = cls(config)
        tell = on_progress or (lambda _line: None)
        try:
            tell(f"starting {config.engine.ep_size} ranks for {directory}")
            engine.tokenizer = load_tokenizer(directory)
            engine._await_ready(tell)
        except BaseException:
            engine.close()
            raise
        engine._reader = threading.Thread(target=engine._read, name="engine-reader", daemon=True)
        engine._reader.start()
        return engine

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        """Streams the answer to ``request``; leaving the iteration early aborts it.

        Raises:
            ConfigError: ``input_ids`` empty, too long or outside the vocabulary, or ``rid`` in use.
            EngineDeadError: the engine is dead, or dies meanwhile.
        """
        self._check(request)
        waiting = _Waiting(asyncio.get_running_loop(), asyncio.Queue())
        with self._books:
            self._require_alive()
            if request.rid in self._streams:
                raise ConfigError(f"rid {request.rid!r} names a request that is running", field="rid")
            self._streams[request.rid] = waiting
        finished = False
        try:
            self._send(Submit(request))
            while not finished:
                event = await waiting.inbox.get()
                if isinstance(event, EquipoiseError):
                    raise event
                assert isinstance(event, TokenEvent)
                finished = event.finish_reason is not None
                yield event
        finally:
            with self._books:
                self._streams.pop(request.rid, None)
            if not finished:
                with contextlib.suppress(EngineDeadError):
                    self._send(Abort(request.rid))

    async def abort(self, rid: str) -> None:
        """Ends a request early; its stream gets a last event. Nothing if there is no such request."""
        self._send(Abort(rid))

    async def control(self, command: Command) -> Any:
        """Has all ranks execute ``command`` between two steps; returns rank 0's reply.

        Raises:
            EquipoiseError: what the command failed with.
            EngineDeadError: the engine is dead, or dies meanwhile.
        """
        waiting = _Waiting(asyncio.get_running_loop(), asyncio.Queue())
        with self._books:
            self._require_alive()
            call_id = self._num_calls
            self._num_calls += 1
            self._calls[call_id] = waiting
        try:
            self._send(Control(call_id, command))
            reply = await waiting.inbox.get()
        finally:
            with self._books:
                self._calls.pop(call_id, None)
        if isinstance(reply, EquipoiseError):
            raise reply
        return reply

    def close(self) -> None:
        """Ends all processes and waits until they are gone. May be called more than once."""
        with contextlib.suppress(EngineDeadError):
            self._send(Stop())
        self._die("the engine was closed")
        if self._reader is None:
            self._processes.terminate()  # the ranks were still starting: nothing that must end in order
        elif self._reader is not threading.current_thread():
            self._reader.join(CLOSE_SECONDS)
        self._processes.close()

    def _check(self, request: GenerateRequest) -> None:
        ids = request.input_ids
        if not ids:
            raise ConfigError("input_ids must not be empty", field="input_ids")
        if len(ids) >= self.max_model_len:
            raise ConfigError(
                f"input_ids has {len(ids)} tokens, with max_model_len={self.max_model_len} at most "
                f"{self.max_model_len - 1} leave room for an answer",
                field="input_ids",
            )
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise ConfigError(
                    f"input_ids must hold integers in [0, {self.vocab_size}), got {token!r}", field="input_ids"
                )

    def _require_alive(self) -> None:
        if self.error is not None:
            raise EngineDeadError(self.error)

    def _send(self, message: ToEngine) -> None:
        self._require_alive()
        self._processes.send(message)

    def _await_ready(self, tell: Callable[[str], None]) -> None:
        while True:
            for message in self._processes.receive():
                if isinstance(message, Started):
                    self.worker_pids = message.pids
                    tell("loading weights")
                elif isinstance(message, Ready):
                    self.max_model_len = message.max_model_len
                    self.vocab_size = message.vocab_size
                    self.eos_token_ids = message.eos_token_ids
                    self.weight_bytes = message.weight_bytes
                    tell("ready")
                    return
                elif isinstance(message, Died):
                    raise message.error or EngineDeadError(message.obituary)
                else:
                    raise EngineDeadError("the engine ended while it was starting")

    def _read(self) -> None:
        """The reader thread: hands what comes from the engine to the calls that wait for it."""
        while True:
            for message in self._processes.receive():
                if isinstance(message, Tokens):
                    self._hand_out(message)
                elif isinstance(message, Reply):
                    with self._books:
                        call = self._calls.get(message.call_id)
                    if call is not None:
                        call.put(message.value)
                elif isinstance(message, Died | Ended):
                    self._die(message.obituary if isinstance(message, Died) else "the engine was closed")
                    return

    def _hand_out(self, message: Tokens) -> None:
        with self._books:
            pairs = [(self._streams.get(event.rid), event) for event in message.events]
        for stream, event in pairs:
            if stream is not None:
                stream.put(event)

    def _die(self, reason: str) -> None:
        with self._books:
            if self.error is None:
                self.error = reason
            for waiting in [*self._streams.values(), *self._calls.values()]:
                waiting.put(EngineDeadError(self.error))
