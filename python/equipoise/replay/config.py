"""Options of `equipoise replay`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from equipoise.config import EplbConfig, require, require_at_least


@dataclass(frozen=True)
class ReplayConfig:
    """`equipoise replay`: recorded load played window by window against one or more algorithms."""

    num_ranks: int = 8
    """Ranks to place the experts on."""

    num_nodes: int = 1
    """Nodes the ranks form."""

    num_redundant_experts: int = 0
    """Slots per layer beyond one for each logical expert."""

    num_groups: int | None = None
    """Expert groups of group-limited routing, for the algorithms that honour them."""

    window: int = 8
    """Steps in a load window: a plan sees the windows before, its score comes from the windows after."""

    history: int | None = None
    """Past windows a plan looks back on; None: 8, or 1 for the published planners, which add up what they get."""

    rebalance_every: int = 1
    """Windows between two plans."""

    max_moves_per_layer: int | None = None
    """Hard limit on slots changed per layer and plan."""

    move_price: float = EplbConfig.eplb_move_price
    """Balancedness that moving every slot of a layer within its node must gain to be worth it."""

    expert_bytes: int | None = None
    """Bytes of one expert of one layer, to turn moves into bytes."""

    tokens_per_step: int = 128
    """For traces of single tokens: consecutive tokens that make one step."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "num_ranks num_nodes window history rebalance_every tokens_per_step")
        require_at_least(0, self, "num_redundant_experts")
        require(0 <= self.move_price < math.inf, "move_price", self.move_price, "finite and not negative")
