"""Chooses the tokens of the next step: continuous batching with chunked prefill. Rank 0 only; no tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from equipoise.engine.detokenizer import IncrementalDetokenizer
from equipoise.engine.model.step_batch import Segment, StepBatch
from equipoise.engine.requests import FinishReason, GenerateRequest, TokenEvent


@dataclass
class _Running:
    request: GenerateRequest
    row: int
    detokenizer: IncrementalDetokenizer
    tokens: list[int] = field(default_factory=list)  # prompt and answer
    cached: int = 0  # of which the cache holds

    @property
    def num_new(self) -> int:
        return len(self.tokens) - len(self.request.input_ids)


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
        sampled = [i for i, (running, length) in enumerate(chosen) if running.cached + length == len(running.tokens)]
        return StepBatch(segments, tuple(token for part in tokens for token in part), tuple(sampled))

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

    def sampled_requests(self, batch: StepBatch) -> list[GenerateRequest]:
        """Requests whose next tokens the step's logits are for, in the order of the logits."""
        return [self._in_step[i].request for i in batch.sampled]

    def complete(self, batch: StepBatch, new_tokens: Sequence[int]) -> list[TokenEvent]:
        """Take the outcome of a step: one token per sampled segment."""
        for running, segment in zip(self._in_step, batch.segments, strict=True):
            running.cached = segment.end
        events = []
        for index, token in zip(batch.sampled, new_tokens, strict=True):
            running = self._in_step[index]
            running.tokens.append(token)
            events.append(self._advance(running, token))
        self._in_step = []
        return events

    def _advance(self, running: _Running, token: int) -> TokenEvent:
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
        return TokenEvent(running.request.rid, [token], text, reason)

    def _release(self, running: _Running) -> None:
        del self._running[running.request.rid]
        self._free_rows.append(running.row)
        self._free_rows.sort(reverse=True)  # the lowest goes next: rows in use stay together
