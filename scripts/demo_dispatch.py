"""What dispatch by the batch gains in the demo, and what moving experts adds: from the steps that were recorded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from equipoise.load.trace import LoadTrace


@dataclass(frozen=True)
class DispatchGain:
    """Balancedness step by step: what the ranks computed over what they could have while the busiest was at work."""

    planned: float  # after the shift, had the tokens been split by the weights planned for the topic before
    dispatched: float  # the same steps and the same placement, as they were
    moved: float  # after the rebalance

    @property
    def text(self) -> str:
        return (
            f"dispatch alone: {self.planned:.3f} by planned weights -> {self.dispatched:.3f} by the batch, same steps"
        )

    @property
    def moving_text(self) -> str:
        return f"moving adds: {self.dispatched:.3f} -> {self.moved:.3f} after the rebalance"


def dispatch_gain(
    trace: LoadTrace, before: dict[str, Any], after: dict[str, Any], location: dict[str, Any], num_steps: int
) -> DispatchGain:
    """Compares the last ``num_steps`` steps before the statuses ``before`` and ``after``.

    Args:
        trace: with physical counts, over all these steps.
        location: GET /eplb/expert_location while the placement of ``before`` was live.
    """
    assert trace.physical_count is not None
    shifted, settled = (
        np.flatnonzero(trace.forward_pass_ids < status["forward_pass_id"])[-num_steps:] for status in (before, after)
    )
    experts = np.array(location["physical_to_logical_map"])
    logical = trace.logical_count[shifted]
    planned = np.take_along_axis(logical, np.broadcast_to(experts, (len(logical), *experts.shape)), axis=2)
    planned = planned * np.array(location["dispatch_weights"])
    ranks = location["num_ranks"]
    return DispatchGain(
        step_balance(planned, ranks),
        step_balance(trace.physical_count[shifted], ranks),
        step_balance(trace.physical_count[settled], ranks),
    )


def step_balance(by_slot: np.ndarray, num_ranks: int) -> float:
    """Mean over largest rank load of (T, L, P) tokens, both summed over steps and layers."""
    by_rank = by_slot.reshape(*by_slot.shape[:2], num_ranks, -1).sum(-1)
    return float(by_rank.mean(-1).sum() / by_rank.max(-1).sum())
