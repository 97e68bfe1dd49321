"""A step as one packed sequence: the new tokens of every request side by side, without padding.

A step may hold requests that decode (one new token) and prompts or pieces of prompts (several). Attention takes a
*run* at a time: a prompt, or requests that decode in adjacent rows of the cache, if their contexts are about as long.
With rows 1, 2 and 4 decoding at positions 3, 2 and 7, and row 0 with a prompt of 5 tokens::

    tokens      [ row 1 @ 3 | row 2 @ 2 | row 4 @ 7 | row 0 @ 0 1 2 3 4 ]        T = 8
    runs        [       0               |     1     |         2         ]
    contexts    [ row 1: 4 | row 2: 3 + 1 unused | row 4: 8 | row 0: 5  ]        C = 4 + 4 + 8 + 5
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from equipoise.engine.model.visibility import Visibility
from equipoise.formats.raw_trace import StepPhase

# Unused entries that attention reads rather than make one more call. On accelerators a launch costs more than any
# reading; on CPUs a call costs about as much as so many entries (measured with key heads of 2 x 32 and 4 x 64).
_PADDING_WORTH_A_CALL = {"cpu": 128}


@dataclass(frozen=True)
class Segment:
    """``length`` new tokens of the request in cache row ``row``, the first of them at position ``start``."""

    row: int
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class StepBatch:
    """One forward pass. Every rank gets the same."""

    segments: tuple[Segment, ...]  # fewest runs: those of length 1 first, by row
    token_ids: tuple[int, ...]  # (T,), in segment order
    sampled: tuple[int, ...]  # segments whose last token is followed by a new one
    scored: tuple[int, ...] = ()  # segments whose every token's logits are wanted: prompts with log probabilities

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_decode_tokens(self) -> int:
        """Tokens of requests that add one to the step, which come first. A last piece of a prompt may be one of them:
        what it costs, and what attention it takes, is a decoded token's (vLLM tells the two apart in the same way)."""
        return sum(segment.length == 1 for segment in self.segments)

    @property
    def phase(self) -> StepPhase:
        if self.num_decode_tokens == self.num_tokens:
            return "decode"
        return "mixed" if self.num_decode_tokens else "prefill"

    def logit_rows(self) -> list[range]:
        """Per segment, the tokens of the step whose logits are wanted, in the order in which the logits come."""
        rows, end = [], 0
        for index, segment in enumerate(self.segments):
            end += segment.length
            first = end - segment.length if index in self.scored else end - (index in self.sampled)
            rows.append(range(first, end))
        return rows


@dataclass(frozen=True)
class Run:
    """Segments that one call of attention takes: a single one of any length, or decoding ones in adjacent rows."""

    segments: tuple[Segment, ...]
    width: int  # entries of the longest of their contexts; the others are padded
    query_start: int  # first of its tokens in the step
    context_start: int  # first of its entries in the contexts

    @property
    def row(self) -> int:
        return self.segments[0].row

    @property
    def num_rows(self) -> int:
        return len(self.segments)

    @property
    def length(self) -> int:
        """New tokens of each segment."""
        return self.segments[0].length

    @property
    def whole_prompt(self) -> bool:
        return 1 < self.length == self.width

    def first_visible(self, visibility: Visibility) -> int:
        """The first entry that any of its tokens may attend to."""
        return visibility.first(min(segment.start for segment in self.segments))


@dataclass
class StepLayout:
    """Where the tokens of a step lie in the cache, for all layers. All index tensors are int64 on the device."""

    position_ids: torch.Tensor  # (1, T)
    rows: torch.Tensor  # (T,) cache rows that the new tokens go to
    logit_tokens: torch.Tensor  # (N,) tokens of the step whose logits are wanted
    runs: tuple[Run, ...]  # in the order of the segments
    _masks: dict[tuple[int, Visibility], torch.Tensor | None] = field(default_factory=dict)

    @classmethod
    def build(cls, batch: StepBatch, device: torch.device) -> StepLayout:
        segments = batch.segments
        lengths = [segment.length for segment in segments]
        positions = [np.arange(segment.start, segment.end) for segment in segments]
        return cls(
            position_ids=_on_device(np.concatenate(positions), device)[None],
            rows=_on_device(np.repeat([segment.row for segment in segments], lengths), device),
            logit_tokens=_on_device([token for rows in batch.logit_rows() for token in rows], device),
            runs=_runs(segments, _PADDING_WORTH_A_CALL.get(device.type, math.inf)),
        )

    @property
    def num_entries(self) -> int:
        """C, of all contexts."""
        return self.runs[-1].context_start + self.runs[-1].num_rows * self.runs[-1].width

    def mask(self, run: Run, visibility: Visibility) -> torch.Tensor | None:
        """(rows, 1, length, width - first visible) bool, True where a token may attend; None: everywhere."""
        key = (run.query_start, visibility)
        if key not in self._masks:
            self._masks[key] = self._make_mask(run, visibility)
        return self._masks[key]

    def _make_mask(self, run: Run, visibility: Visibility) -> torch.Tensor | None:
        if run.length == 1 and all(segment.end == run.width for segment in run.segments):
            return None
        device = self.position_ids.device
        entry = torch.arange(run.first_visible(visibility), run.width, device=device)
        tokens = slice(run.query_start, run.query_start + run.num_rows * run.length)
        position = self.position_ids[0, tokens].view(run.num_rows, 1, run.length, 1)
        return visibility.mask(position, entry)


def _runs(segments: Sequence[Segment], padding_worth_a_call: float) -> tuple[Run, ...]:
    """Decoding segments join the run before them as long as that pads less than the calls it saves are worth."""
    runs: list[Run] = []
    query_start, context_start = 0, 0
    for segment in segments:
        joined = (*runs[-1].segments, segment) if runs else (segment,)
        width = max(part.end for part in joined)
        padding = len(joined) * width - sum(part.end for part in joined)
        if (
            len(joined) > 1
            and segment.length == joined[0].length == 1
            and segment.row == joined[-2].row + 1
            and padding <= padding_worth_a_call * (len(joined) - 1)
        ):
            runs[-1] = replace(runs[-1], segments=joined, width=width)
        else:
            runs.append(Run((segment,), segment.end, query_start, context_start))
        query_start += segment.length
        context_start = runs[-1].context_start + runs[-1].num_rows * runs[-1].width
    return tuple(runs)


def _on_device(values: Sequence[int] | np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values, dtype=np.int64)).to(device, non_blocking=True)
