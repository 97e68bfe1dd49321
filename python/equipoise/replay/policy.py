"""What decides on a new placement during a replay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from equipoise.algorithms.rebalance import rebalance_experts
from equipoise.config import EplbConfig
from equipoise.placement.metadata import ExpertLocationMetadata


class Policy(Protocol):
    """Plans from the past alone."""

    @property
    def name(self) -> str: ...

    def plan(self, history: np.ndarray, current: ExpertLocationMetadata) -> ExpertLocationMetadata:
        """The placement for the windows to come; ``current`` itself to stay.

        Args:
            history: (H, L, E) int64, the load windows before, oldest first, H at least 1.
            current: the placement in force.
        """
        ...


@dataclass(frozen=True)
class AlgorithmPolicy:
    """Follows an algorithm's plan every time."""

    name: str  # of the algorithm
    num_groups: int | None = None
    max_moves_per_layer: int | None = None
    move_price: float = EplbConfig.eplb_move_price

    def plan(self, history: np.ndarray, current: ExpertLocationMetadata) -> ExpertLocationMetadata:
        return rebalance_experts(
            history,
            current.topology,
            algorithm=self.name,
            current=current,
            num_groups=self.num_groups,
            max_moves_per_layer=self.max_moves_per_layer,
            move_price=self.move_price,
        )
