"""A step as one packed sequence: the new tokens of every request side by side, without padding.

A step may hold requests that decode (one new token) and prompts or pieces of prompts (several). Requests with one
new token come first; attention takes them as one batch. With three requests, rows 4 and 1 decoding at lengths 7 and 3,
row 0 with a prompt of 5 tokens::

    tokens      [ row 4 @ 7 | row 1 @ 3 | row 0 @ 0 1 2 3 4 ]        T = 7
    contexts    [ row 4: 8  | row 1: 4 + 4 unused | row 0: 5 ]       C = 8 + 8 + 5
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch


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

    segments: tuple[Segment, ...]  # those of length 1 first
    token_ids: tuple[int, ...]  # (T,), in segment order
    sampled: tuple[int, ...]  # segments whose last token is followed by a new one

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class PrefillSpan:
    query_start: int  # first of its tokens in the step
    query_length: int
    context_start: int  # first of its entries in the contexts
    context_length: int


@dataclass
class StepLayout:
    """Where the tokens of a step lie in the cache, for all layers. All index tensors are int64 on the device."""

    position_ids: torch.Tensor  # (1, T)
    write_index: torch.Tensor  # (T,) cache entries that the new tokens fill
    read_index: torch.Tensor  # (C,) cache entries of all contexts, the decoding ones padded to one width
    last_tokens: torch.Tensor  # (num sampled,) tokens of the step whose logits are wanted
    num_decode: int
    decode_width: int
    decode_lengths: torch.Tensor  # (num_decode,) context lengths, the new token included
    uniform: bool  # all decoding contexts fill decode_width
    prefills: tuple[PrefillSpan, ...]
    _masks: dict[tuple[int, int | None], torch.Tensor | None] = field(default_factory=dict)

    @classmethod
    def build(cls, batch: StepBatch, capacity: int, device: torch.device) -> StepLayout:
        """``capacity``: cache entries per row."""
        segments = batch.segments
        num_decode = sum(segment.length == 1 for segment in segments)
        decodes, rest = segments[:num_decode], segments[num_decode:]
        assert all(segment.length > 1 for segment in rest), "segments of one token come first"
        width = max((segment.end for segment in decodes), default=0)
        positions = [np.arange(segment.start, segment.end) for segment in segments]
        writes = [segment.row * capacity + span for segment, span in zip(segments, positions, strict=True)]
        # Entries past a context's end are read and masked; row and width keep them inside the cache.
        reads = [segment.row * capacity + np.arange(width) for segment in decodes]
        reads += [segment.row * capacity + np.arange(segment.end) for segment in rest]
        ends = np.cumsum([segment.length for segment in segments])
        prefills, query_start, context_start = [], num_decode, num_decode * width
        for segment in rest:
            prefills.append(PrefillSpan(query_start, segment.length, context_start, segment.end))
            query_start += segment.length
            context_start += segment.end
        lengths = [segment.end for segment in decodes]

        def on_device(values: Sequence[int] | np.ndarray) -> torch.Tensor:
            return torch.as_tensor(np.asarray(values, dtype=np.int64)).to(device, non_blocking=True)

        return cls(
            position_ids=on_device(np.concatenate(positions))[None],
            write_index=on_device(np.concatenate(writes)),
            read_index=on_device(np.concatenate(reads)),
            last_tokens=on_device([int(ends[i]) - 1 for i in batch.sampled]),
            num_decode=num_decode,
            decode_width=width,
            decode_lengths=on_device(lengths),
            uniform=all(length == width for length in lengths),
            prefills=tuple(prefills),
        )

    def decode_mask(self, window: int | None) -> torch.Tensor | None:
        """(num_decode, 1, 1, decode_width) bool, True where a decoding token may look; None: everywhere."""
        key = (-1, window)
        if key not in self._masks:
            self._masks[key] = self._make_decode_mask(window)
        return self._masks[key]

    def prefill_mask(self, index: int, window: int | None) -> torch.Tensor:
        """(query_length, context_length) bool, True where a token of the ``index``-th prefill span may look."""
        key = (index, window)
        if key not in self._masks:
            span = self.prefills[index]
            device = self.position_ids.device
            entry = torch.arange(span.context_length, device=device)
            position = entry[span.context_length - span.query_length :, None]
            mask = entry <= position
            self._masks[key] = mask if window is None else mask & (entry > position - window)
        mask_or_none = self._masks[key]
        assert mask_or_none is not None
        return mask_or_none

    def _make_decode_mask(self, window: int | None) -> torch.Tensor | None:
        if self.uniform and (window is None or window >= self.decode_width):
            return None
        entry = torch.arange(self.decode_width, device=self.decode_lengths.device)
        length = self.decode_lengths[:, None]
        mask = entry < length
        if window is not None:
            mask &= entry >= length - window
        return mask[:, None, None, :]
