"""Steps of a small model for streamed recordings: their slots, and the counts that these make."""

from __future__ import annotations

import numpy as np
import torch

from equipoise.load.step_writer import StepSink

L, P, E = 2, 6, 4
MAP = torch.tensor([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 0, 0]])


def physical_of(step: int) -> torch.Tensor:
    return torch.arange(L * P, dtype=torch.int32).reshape(L, P) + step


def logical_of(step: int) -> np.ndarray:
    """The oracle, slot by slot."""
    load = np.zeros((L, E), np.int64)
    for layer, slot in np.ndindex(L, P):
        load[layer, MAP[layer, slot]] += physical_of(step)[layer, slot].item()
    return load


def append(sink: StepSink, steps: list[int], offset: int) -> None:
    ids = np.array(steps)
    counts = np.array([logical_of(step + offset) for step in steps])
    sink.append(counts[:, None], forward_pass_ids=ids, phases=np.full(len(ids), 2), timestamps=10.0 + ids)
