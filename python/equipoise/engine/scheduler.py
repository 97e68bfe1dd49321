"""Chooses the tokens of the next step: continuous batching with chunked prefill. Rank 0 only; no tensors."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from equipoise.engine.detokenizer import IncrementalDetokenizer
from equipoise.engine.model.step_batch import Segment, StepBatch
from equipoise.engine.requests import FinishReason, GenerateRequest, TokenEvent, TokenLogprob

_log = logging.getLogger("equipoise.engine")


@dataclass
class _Running:
    request: GenerateRequest
    row: int
    detokenizer: IncrementalDetokenizer
    tokens: list[int] = field(default_factory=list)  # prompt and answer
    cached: int = 0  # of which the cache holds
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def num_new(self) -> int:
        return len(self.tokens) - len(self.request.input_ids)


@dataclass(frozen=True)
class Outcome:
    """What a step gave for one segment."""

    token: int | None = None  # the next token; None where the prompt goes on in a later step
    ends_prompt: bool = False  # logits behind the last token are there, whether or not one was drawn
    logprobs: tuple[TokenLogprob, ...] = ()  # of the token
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # of the segment's tokens, or of those behind them
    error: str | None = None


class Scheduler:
    """Schedule first come, first served: running requests decode in every step, prompts get the rest of it.

    Args:
        num_rows: requests that can run together.
        max_model_len: tokens of a request, prompt and answer together.
        step_tokens: tokens of a step, if more than the running requests decode.
        eos_token_ids: tokens that end an answer.
        decode: token ids to text.
    """

    def __init__(
        self,
        *,
        num_rows: int,
        max_model_len: int,
        step_tokens: int,
        eos_token_ids: Sequence[int],
        decode: Callable[[list[int]], str],
    ) -> None:
        self._free_rows = list(range(num_rows))[::-1]
        self._max_model_len = max_model_len
        self._step_tokens = step_tokens
        self._eos = frozenset(eos_token_ids)
        self._decode = decode
        self._waiting: deque[GenerateRequest] = deque()
        self._running: dict[str, _Running] = {}
        self._in_step: list[_Running] = []

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, request: GenerateRequest) -> None:
        self._waiting.append(request)

    def abort(self, rid: str) -> list[TokenEvent]:
        """End a request; no event if there is none of that name any more."""
        for request in self._waiting:
            if request.rid == rid:
                self._waiting.remove(request)
                return [TokenEvent(rid, [], "", "abort")]
        if rid not in self._running:
            return []
        text, _ = self._running[rid].detokenizer.finish()
        self._release(self._running[rid])
        return [TokenEvent(rid, [], text, "abort")]

    def next_batch(self) -> StepBatch | None:
        """The next step, or None if there is nothing to do."""
        while self._waiting and self._free_rows:
            request = self._waiting.popleft()
            detokenizer = IncrementalDetokenizer(self._decode, request.sampling.stop)
            running = _Running(request, self._free_rows.pop(), detokenizer, list(request.input_ids))
            self._running[request.rid] = running
        lengths = self._allot()
        if not lengths:
            return None
        # Single tokens first, by row, so that attention can take them together; prompts stay as they came.
        chosen = sorted(lengths, key=lambda pair: (pair[1] > 1, pair[0].row if pair[1] == 1 else 0))
        self._in_step = [running for running, _ in chosen]
        segments = tuple(Segment(running.row, running.cached, length) for running, length in chosen)
        tokens = [running.tokens[running.cached : running.cached + length] for running, length in chosen]
        sampled, scored = [], []
        for i, (running, length) in enumerate(chosen):
            if running.cached + length == len(running.tokens):
                sampled.append(i)
            if running.request.sampling.prompt_logprobs and running.cached < len(running.request.input_ids):
                scored.append(i)
        flat = tuple(token for part in tokens for token in part)
        return StepBatch(segments, flat, tuple(sampled), tuple(scored))

    def _allot(self) -> list[tuple[_Running, int]]:
        """Choose new tokens per request for the next step: all that decode, then prompts up to the step's budget."""
        pending = [(running, len(running.tokens) - running.cached) for running in self._running.values()]
        decoding = [(running, 1) for running, missing in pending if missing == 1]
        budget = max(self._step_tokens - len(decoding), 1)
        prompts = []
        for running, missing in pending:
            if missing > 1 and budget > 0:
                prompts.append((running, min(missing, budget)))
                budget -= prompts[-1][1]
        return decoding + prompts

    def requests_in_step(self) -> list[GenerateRequest]:
        """Requests of the step that was made last, in the order of its segments."""
        return [running.request for running in self._in_step]

    def complete(self, batch: StepBatch, outcomes: Sequence[Outcome]) -> list[TokenEvent]:
        """Take the outcome of a step, one per segment. An error ends the request it is of, and no other."""
        events = []
        for running, segment, outcome in zip(self._in_step, batch.segments, outcomes, strict=True):
            running.cached = segment.end
            running.prompt_logprobs += outcome.prompt_logprobs
            if outcome.error is not None:
                events.append(self.fail(running.request.rid, outcome.error))
            elif outcome.ends_prompt and running.request.sampling.max_new_tokens == 0:
                self._release(running)
                events.append(TokenEvent(running.request.rid, [], "", "length", (), tuple(running.prompt_logprobs)))
            elif outcome.token is not None:
                running.tokens.append(outcome.token)
                try:
                    events.append(self._advance(running, outcome))
                except Exception as error:  # a tokenizer that cannot decode what a model can say
                    _log.exception("request %s failed while its tokens were decoded", running.request.rid)
                    events.append(self.fail(running.request.rid, f"{type(error).__name__}: {error}"))
        self._in_step = []
        return events

    def fail(self, rid: str, reason: str) -> TokenEvent:
        """End a running request with an error of its own."""
        self._release(self._running[rid])
        return TokenEvent(rid, [], "", "error", error=reason)

    def _advance(self, running: _Running, outcome: Outcome) -> TokenEvent:
        token = outcome.token
        assert token is not None
        sampling = running.request.sampling
        reason: FinishReason | None = None
        text = ""
        if token in sampling.stop_token_ids or (token in self._eos and not sampling.ignore_eos):
            reason = "stop"
        else:
            text, stopped = running.detokenizer.push([token])
            if stopped:
                reason = "stop"
            elif running.num_new >= sampling.max_new_tokens or len(running.tokens) >= self._max_model_len:
                reason = "length"
        if reason is not None:
            rest, stopped = running.detokenizer.finish()
            text += rest
            reason = "stop" if stopped else reason
            self._release(running)
        prompt, running.prompt_logprobs = tuple(running.prompt_logprobs), []
        return TokenEvent(running.request.rid, [token], text, reason, outcome.logprobs, prompt)

    def _release(self, running: _Running) -> None:
        del self._running[running.request.rid]
        self._free_rows.append(running.row)
        self._free_rows.sort(reverse=True)  # the lowest goes next: rows in use stay together
