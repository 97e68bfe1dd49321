"""What a rank's experts call while dispatch_engine.py times steps.

A batch goes to the slots of its first dispatch, whether it is dispatched again or not. Those of each dispatch take
turns: a step that dispatches would hand its experts other numbers of tokens than before, and the next one, which does
not, those very numbers again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from equipoise.dispatch.dispatcher import ExpertDispatcher
from equipoise.load.recorder import ExpertDistributionRecorder
from equipoise.load.step_stream import CountStream


@dataclass
class Routing:
    """What a rank's experts call: dispatch with or without counting, or the slots of the first dispatch alone."""

    dispatchers: dict[str, ExpertDispatcher]
    recorder: ExpertDistributionRecorder
    metadata_map: torch.Tensor
    policy: str = "batch"
    mode: str = "dispatch"  # dispatch | record | stream | remember
    stream: CountStream | None = None  # where each step is written in mode stream

    def __post_init__(self) -> None:
        self.batch = 0  # which of the batches is computed
        self._remembered: dict[tuple[int, int], torch.Tensor] = {}  # by batch and layer
        self._number = 0
        self.inside = 0.0  # seconds in here since it was last set to 0

    def begin(self, policy: str) -> None:
        """Takes up a policy and other batches."""
        self.policy = policy
        self._remembered.clear()

    def route(self, layer_id: int, topk_ids: torch.Tensor, rank_bounds: Sequence[int] | None) -> torch.Tensor:
        key = (self.batch, layer_id)
        if self.mode == "remember":
            return self._remembered[key]
        began = time.perf_counter()
        counts = self.recorder.counts if self.mode in ("record", "stream") else None
        slots = self.dispatchers[self.policy].dispatch(layer_id, topk_ids, rank_bounds=rank_bounds, counts=counts)
        self.inside += time.perf_counter() - began
        return self._remembered.setdefault(key, slots)  # the first ones: each step of a batch computes the same

    def end_step(self, num_tokens: int) -> None:
        if self.mode == "remember":
            return
        began = time.perf_counter()
        self.dispatchers[self.policy].advance(num_tokens)
        if self.mode in ("record", "stream"):
            self.recorder.stream = self.stream if self.mode == "stream" else None
            self.recorder.end_step(self.metadata_map, forward_pass_id=self._number, counted=True)
            self._number += 1
        self.inside += time.perf_counter() - began
