"""Rank 0's side of the engine: takes requests and commands, makes the step inputs, samples, streams tokens."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from equipoise.config import EngineConfig
from equipoise.engine.checkpoint.files import load_tokenizer
from equipoise.engine.messages import (
    Abort,
    Control,
    FromEngine,
    Ping,
    Pong,
    Ready,
    Reply,
    Stop,
    Submit,
    ToEngine,
    Tokens,
)
from equipoise.engine.model.blueprint import ModelBlueprint
from equipoise.engine.model.step_batch import StepBatch
from equipoise.engine.requests import GenerateRequest, TokenEvent, TokenLogprob
from equipoise.engine.sampler import Sampler, token_logprobs
from equipoise.engine.scheduler import Outcome, Scheduler
from equipoise.engine.step_channel import StepInput
from equipoise.engine.step_log import GetSteps, GetStepTotals, StepLog, StepRecord
from equipoise.manager.command_handler import PendingReply
from equipoise.manager.commands import Command
from equipoise.manager.reports import Phase

_log = logging.getLogger("equipoise.engine")


class Frontend:
    """Connects the launcher's pipe with the scheduler and the ranks."""

    def __init__(
        self, config: EngineConfig, blueprint: ModelBlueprint, pipe: Connection, weight_bytes: tuple[int, ...]
    ) -> None:
        tokenizer = load_tokenizer(blueprint.directory)
        self._pipe = pipe
        self._scheduler = Scheduler(
            num_rows=config.max_running_requests,
            max_model_len=blueprint.max_model_len,
            step_tokens=config.chunked_prefill_size,
            eos_token_ids=blueprint.eos_token_ids,
            decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        )
        self._seed = config.random_seed
        self._num_requests = 0
        self._samplers: dict[str, Sampler] = {}
        self._commands: list[Control] = []
        self._called: list[int] = []  # call ids of the commands of the last step input
        self._open: list[tuple[int, PendingReply[Any]]] = []
        self._steps = StepLog()
        self._step_began = 0.0
        self._pinged = False
        self._stop = False
        self._send(Ready(blueprint.max_model_len, blueprint.vocab_size, blueprint.eos_token_ids, weight_bytes))

    def next_step(self, *, idle: bool) -> StepInput:
        """Make the input of all ranks' next step; sleeps without requests and commands if ``idle``."""
        while not self._stop:  # a pipe that the launcher has closed would be ready for ever
            nothing_to_do = not (self._scheduler.has_work or self._commands or self._pinged)
            if not self._pipe.poll(None if nothing_to_do and idle else 0):
                break
            self._take(self._receive())
        self._step_began = time.perf_counter()
        commands, self._commands = self._commands, []
        self._called = [control.call_id for control in commands]
        batch = None if self._stop else self._scheduler.next_batch()
        ping, self._pinged = self._pinged, False
        return StepInput(batch, tuple(control.command for control in commands), ping, self._stop)

    def pong(self) -> None:
        """Answer a Ping: all ranks live."""
        self._send(Pong())

    def settle(self, replies: Sequence[PendingReply[Any]]) -> None:
        """Answer the commands whose work is done; ``replies`` are those of the last step input's commands."""
        self._open += zip(self._called, replies, strict=True)
        for call_id, pending in self._open:
            if pending.done:
                self._send(Reply(call_id, pending.reply))
        self._open = [(call_id, pending) for call_id, pending in self._open if not pending.done]

    def complete(self, batch: StepBatch, logits: torch.Tensor, forward_pass_id: int, phase: Phase) -> None:
        """Draw the next tokens from (N, V) logits, as ``batch.logit_rows`` orders them; stream them, log the step."""
        greedy = logits.argmax(dim=-1)
        outcomes, start = [], 0
        requests = self._scheduler.requests_in_step()
        for index, (request, rows) in enumerate(zip(requests, batch.logit_rows(), strict=True)):
            mine = slice(start, start + len(rows))
            start += len(rows)
            try:
                outcomes.append(self._outcome(request, batch, index, logits[mine], greedy[mine]))
            except Exception as error:  # of this request alone: the others' answers must not end with it
                _log.exception("request %s failed while its next token was drawn", request.rid)
                outcomes.append(Outcome(error=f"{type(error).__name__}: {error}"))
        self._tell(self._scheduler.complete(batch, outcomes))
        seconds = time.perf_counter() - self._step_began
        self._steps.note(StepRecord(forward_pass_id, seconds, batch.num_tokens, phase))

    def _outcome(
        self, request: GenerateRequest, batch: StepBatch, index: int, logits: torch.Tensor, greedy: torch.Tensor
    ) -> Outcome:
        """What segment ``index`` gives; ``logits`` and their ``greedy`` choices are those of its tokens."""
        sampling, segment = request.sampling, batch.segments[index]
        ends = index in batch.sampled
        scored: list[TokenLogprob] = []
        if index in batch.scored:
            following = request.input_ids[segment.start + 1 : segment.end + 1]
            scored = token_logprobs(logits[: len(following)], following, sampling.logprobs or 0)
            if segment.start == 0:  # nothing comes before the first token
                scored.insert(0, TokenLogprob(request.input_ids[0], None))
        if not ends or sampling.max_new_tokens == 0:
            return Outcome(ends_prompt=ends, prompt_logprobs=tuple(scored))
        sampler = self._samplers[request.rid]
        token = int(greedy[-1]) if sampler.is_plain_greedy else sampler.draw(logits[-1])
        sampler.took(token)
        logprobs = () if sampling.logprobs is None else token_logprobs(logits[-1:], [token], sampling.logprobs)
        return Outcome(token, True, tuple(logprobs), tuple(scored))

    def _take(self, message: ToEngine) -> None:
        if isinstance(message, Submit):
            request = message.request
            self._samplers[request.rid] = Sampler(request.sampling, self._seed + self._num_requests, request.input_ids)
            self._num_requests += 1
            self._scheduler.add(request)
        elif isinstance(message, Abort):
            self._tell(self._scheduler.abort(message.rid))
        elif isinstance(message, Control):
            self._take_command(message)
        elif isinstance(message, Ping):
            self._pinged = True
        elif isinstance(message, Stop):
            self._stop = True

    def _take_command(self, control: Control) -> None:
        command: Command[Any] = control.command
        if isinstance(command, GetSteps):
            self._send(Reply(control.call_id, self._steps.since(command.since)))
        elif isinstance(command, GetStepTotals):
            self._send(Reply(control.call_id, self._steps.totals()))
        else:
            self._commands.append(control)

    def _tell(self, events: list[TokenEvent]) -> None:
        for event in events:
            if event.finish_reason is not None:
                self._samplers.pop(event.rid, None)
        if events:
            self._send(Tokens(events))

    def _receive(self) -> ToEngine:
        try:
            message: ToEngine = self._pipe.recv()
        except (EOFError, OSError):
            return Stop()  # the launcher is gone
        return message

    def _send(self, message: FromEngine) -> None:
        try:
            self._pipe.send(message)
        except OSError:
            self._stop = True  # the launcher is gone
