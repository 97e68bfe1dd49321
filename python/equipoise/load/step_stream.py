"""What of a step is streamed to a file: tokens of each expert (CountStream), or experts of each token (TokenStream).

A step leaves what is recorded of it in a staging buffer, which is pinned and copied to beside the forward pass where
there is a GPU; a step that finds none free is dropped. Buffers are allocated once. See step_writer.py for the threads.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import torch

from equipoise.formats.raw_trace import StepPhase
from equipoise.load.step_writer import StagedStep, StepSink, StepWriter


class CountStream(StepWriter):
    """Tokens of this rank for each expert, a record a step.

    Args:
        num_layers, num_logical_experts: ``L``, ``E``.
        num_staged: steps that may wait for the sink; ``4 * num_staged * L * E`` bytes of host memory.
        sink, max_records, device: see :class:`StepWriter`.
    """

    def __init__(
        self,
        num_layers: int,
        num_logical_experts: int,
        sink: StepSink,
        *,
        num_staged: int,
        max_records: int,
        device: torch.device,
    ) -> None:
        shape, on_gpu = (num_layers, num_logical_experts), device.type == "cuda"
        self._staging = torch.zeros(num_staged, *shape, dtype=torch.int32, pin_memory=on_gpu)
        self._folded = torch.zeros(shape, dtype=torch.int32, device=device) if on_gpu else None
        self._free = deque(range(num_staged))
        super().__init__(sink, max_records=max_records, wake_at=num_staged // 2, device=device)

    def add(
        self,
        physical: torch.Tensor,
        physical_to_logical_map: torch.Tensor,
        /,
        forward_pass_id: int,
        phase: StepPhase | None,
    ) -> None:
        """As :meth:`StepWriter.add`: folds the slots into experts."""
        if not (self._has_room(1) and self._free):
            self._drop(forward_pass_id)
            return
        place = self._free.popleft()
        target = self._staging[place] if self._folded is None else self._folded
        target.zero_().scatter_add_(1, physical_to_logical_map, physical)
        copied = None
        if self._folded is not None:
            self._staging[place].copy_(self._folded, non_blocking=True)
            copied = _event()
        self._queue(place, 1, copied, forward_pass_id, phase)

    def _values(self, steps: list[StagedStep]) -> np.ndarray:
        return self._staging.numpy()[[step.place for step in steps]][:, None]

    def _release(self, steps: list[StagedStep]) -> None:
        self._free.extend(step.place for step in steps)


class TokenStream(StepWriter):
    """The experts of each of this rank's tokens, a record a token; one without experts for a step without tokens.

    Args:
        num_layers, top_k: ``L``, ``K``.
        dtype: of the ids, int16 or int32.
        num_staged: tokens that may wait for the sink; ``num_staged * L * K`` ids of host memory, and on a GPU as many
            there. A step of more tokens is always dropped.
        sink, max_records, device: see :class:`StepWriter`.
    """

    def __init__(
        self,
        num_layers: int,
        top_k: int,
        sink: StepSink,
        *,
        dtype: torch.dtype,
        num_staged: int,
        max_records: int,
        device: torch.device,
    ) -> None:
        self._shape, on_gpu = (num_layers, top_k), device.type == "cuda"
        size = num_staged * num_layers * top_k
        self._ring = torch.zeros(size, dtype=dtype, pin_memory=on_gpu)  # of tokens; a step lies in one piece
        self._routed = torch.zeros(size, dtype=dtype, device=device) if on_gpu else None
        self._capacity = num_staged
        self._head = self._num_taken = 0  # where the next step lies; tokens so far, and gaps at the end of the ring
        self._num_released = 0  # of them, by the writer
        self._before: tuple[int, int] | None = None  # the two before the step under way; None: nothing of it yet
        self._step: tuple[int, int] | None = None  # place and tokens of the step under way; None: it has no place
        super().__init__(sink, max_records=max_records, wake_at=num_staged // 4, device=device)

    def record_tokens(self, layer_id: int, topk_ids: torch.Tensor) -> None:
        """As :meth:`StepWriter.record_tokens`."""
        if self._before is None:
            self._begin(len(topk_ids))
        if self._step is not None and len(topk_ids):
            self._view(self._ring if self._routed is None else self._routed, *self._step)[layer_id].copy_(topk_ids)

    def add(
        self,
        _physical: torch.Tensor,
        _physical_to_logical_map: torch.Tensor,
        /,
        forward_pass_id: int,
        phase: StepPhase | None,
    ) -> None:
        """As :meth:`StepWriter.add`: takes what :meth:`record_tokens` was given since the last step."""
        if self._before is None:
            self._begin(0)
        step, self._before, self._step = self._step, None, None
        if step is None:
            self._drop(forward_pass_id)
            return
        copied = None
        if self._routed is not None:
            self._view(self._ring, *step).copy_(self._view(self._routed, *step), non_blocking=True)
            copied = _event()
        self._queue(*step, copied, forward_pass_id, phase)

    def discard(self) -> None:
        """As :meth:`StepWriter.discard`."""
        if self._before is not None:
            self._head, self._num_taken = self._before
        self._before = self._step = None

    def _begin(self, num_tokens: int) -> None:
        """Finds a place for the step under way."""
        self._before = (self._head, self._num_taken)
        size = max(num_tokens, 1)
        place = self._head if self._head + size <= self._capacity else 0
        taken = size if place == self._head else size + self._capacity - self._head
        if not self._has_room(size) or self._num_taken + taken - self._num_released > self._capacity:
            return
        self._head, self._num_taken, self._step = place + size, self._num_taken + taken, (place, size)
        self._view(self._ring if self._routed is None else self._routed, place, size).fill_(-1)

    def _view(self, ring: torch.Tensor, place: int, num_tokens: int) -> torch.Tensor:
        """(L, tokens, K) of a step."""
        layers, top_k = self._shape
        width = layers * top_k
        return ring[place * width : (place + num_tokens) * width].view(layers, num_tokens, top_k)

    def _values(self, steps: list[StagedStep]) -> np.ndarray:
        parts = [self._view(self._ring, step.place, step.num_records).numpy() for step in steps]
        return np.concatenate([part.swapaxes(0, 1) for part in parts])

    def _release(self, steps: list[StagedStep]) -> None:
        for step in steps:
            end = self._num_released % self._capacity
            gap = (step.place - end) % self._capacity  # at the end of the ring, left over
            self._num_released += gap + step.num_records


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(blocking=True)
    event.record()
    return event
