"""Engine: launches the embedded engine and gives asyncio programs access to it."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from equipoise.config import ServeConfig
from equipoise.engine.checkpoint.files import load_tokenizer, model_directory
from equipoise.engine.messages import (
    Abort,
    Control,
    Died,
    Ended,
    Ping,
    Pong,
    Ready,
    Reply,
    Started,
    Stop,
    Submit,
    ToEngine,
    Tokens,
)
from equipoise.engine.pending import PendingCalls
from equipoise.engine.processes import LEAVE_SECONDS, PING_SECONDS, EngineProcesses, Pulse
from equipoise.engine.requests import GenerateRequest, TokenEvent
from equipoise.errors import ConfigError, EngineDeadError, EquipoiseError, RequestFailedError
from equipoise.manager.commands import Command

_log = logging.getLogger("equipoise.engine")


class Engine:
    """A running engine: a supervisor process and ``ep_size`` ranks below it. Made by :meth:`launch`.

    Attributes:
        config: as it was launched.
        tokenizer: transformers' tokenizer of the model.
        max_model_len: tokens a request may have, prompt and answer together.
        eos_token_ids: tokens that end an answer.
        weight_bytes: bytes of weights that each rank read.
        worker_pids: process ids of the ranks.
    """

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.tokenizer: Any = None
        self.max_model_len = config.engine.max_model_len
        self.vocab_size = 0
        self.eos_token_ids: tuple[int, ...] = ()
        self.weight_bytes: tuple[int, ...] = ()
        self.worker_pids: tuple[int, ...] = ()
        self._pending = PendingCalls()
        self._pulse = Pulse()
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

    @property
    def error(self) -> str | None:
        """Why the engine is dead; None while it lives."""
        return self._pending.error

    @property
    def silent_seconds(self) -> float:
        """Time since all ranks together last showed that they make progress; 0 while they do."""
        return self._pulse.silent_seconds

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        """Streams the answer to ``request``; leaving the iteration early aborts it.

        Raises:
            ConfigError: ``input_ids`` empty, too long or outside the vocabulary, or ``rid`` in use.
            RequestFailedError: this request alone came to an end; the engine goes on.
            EngineDeadError: the engine is dead, or dies meanwhile.
        """
        self._check(request)
        stream = self._pending.open_stream(request.rid)
        finished = False
        try:
            self._send(Submit(request))
            while not finished:
                event = await stream.inbox.get()
                if isinstance(event, EquipoiseError):
                    raise event
                assert isinstance(event, TokenEvent)
                if event.error is not None:
                    finished = True
                    raise RequestFailedError(f"request {request.rid} failed: {event.error}")
                finished = event.finish_reason is not None
                yield event
        finally:
            self._pending.close_stream(request.rid)
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
        call_id, call = self._pending.open_call()
        try:
            self._send(Control(call_id, command))
            reply = await call.inbox.get()
        finally:
            self._pending.close_call(call_id)
        if isinstance(reply, EquipoiseError):
            raise reply
        return reply

    def close(self) -> None:
        """End all processes and wait until they are gone. May be called more than once.

        Ranks are asked to leave and have ``LEAVE_SECONDS`` for it. Then the supervisor is told to kill them, which
        reaches stopped ones too. After ``KILL_SECONDS`` more the launcher kills whatever is left, so that a rank or a
        supervisor that is stopped or hangs delays the end by no more than the sum.
        """
        with contextlib.suppress(EngineDeadError):
            self._send(Stop())
        self._pending.fail("the engine was closed")
        if self._reader is None:
            self._processes.terminate()  # the ranks were still starting: nothing that must end in order
        else:
            self._reader.join(LEAVE_SECONDS)
            if self._reader.is_alive():
                _log.warning("ranks that have not left after %g s are killed: are they stopped?", LEAVE_SECONDS)
                self._processes.terminate()
        self._processes.await_end(self.worker_pids)
        if self._reader is not None:
            self._reader.join()  # its pipes have broken
        self._processes.close()

    def _check(self, request: GenerateRequest) -> None:
        ids = request.input_ids
        if not ids:
            raise ConfigError("input_ids must not be empty", field="input_ids")
        if len(ids) > self.max_model_len - (request.sampling.max_new_tokens > 0):
            raise ConfigError(
                f"input_ids has {len(ids)} tokens, with max_model_len={self.max_model_len} at most "
                f"{self.max_model_len - 1} leave room for an answer",
                field="input_ids",
            )
        biased = [token for token, _ in request.sampling.logit_bias]
        if biased and not 0 <= min(biased) <= max(biased) < self.vocab_size:
            raise ConfigError(f"logit_bias must name tokens in [0, {self.vocab_size})", field="logit_bias")
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise ConfigError(
                    f"input_ids must hold integers in [0, {self.vocab_size}), got {token!r}", field="input_ids"
                )

    def _send(self, message: ToEngine) -> None:
        self._pending.require_alive()
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
        """Run the reader thread: hand what comes from the engine to the calls that wait for it, watch its pulse."""
        self._pulse.beat()
        timeout = self.config.engine.watchdog_timeout
        while self._pulse.silent_seconds < timeout:
            for message in self._processes.receive(PING_SECONDS):
                if isinstance(message, Tokens | Pong):
                    self._pulse.beat()
                if isinstance(message, Tokens | Reply):
                    self._pending.hand_out(message)
                elif isinstance(message, Died):
                    if self._pending.error is None:  # or it was closed, and ranks that did not leave were ended
                        _log.error("the engine is dead: %s", message.obituary)
                    return self._pending.fail(message.obituary)
                elif isinstance(message, Ended):
                    return self._pending.fail("the engine was closed")
            if self._pulse.wants_ping():
                with contextlib.suppress(EngineDeadError):
                    self._send(Ping())
        reason = f"given up after {timeout:g} s without a sign of life (--watchdog-timeout): a rank hangs or is stopped"
        _log.error("the engine is dead: %s", reason)
        self._pending.fail(reason)
        self._processes.terminate()
        return None
