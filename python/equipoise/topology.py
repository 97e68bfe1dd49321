"""Where slots, ranks and nodes lie: all index arithmetic of expert parallelism in one frozen value."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from equipoise.errors import ConfigError


@dataclass(frozen=True)
class EpTopology:
    """``num_ranks`` ranks in ``num_nodes`` equal nodes, each rank owning ``slots_per_rank`` consecutive slots.

    Slot ``p`` lives on rank ``p // slots_per_rank``; rank ``g`` on node ``g // ranks_per_node``. For DeepSeek-V3 with
    32 redundant experts on 32 ranks in 4 nodes: ``EpTopology(32, 4, 9)``, 288 slots, 8 ranks and 72 slots a node.

    Raises:
        ConfigError: a number below 1 or no integer (numpy's are), or ranks that do not divide evenly over the nodes.
    """

    num_ranks: int
    num_nodes: int
    slots_per_rank: int

    def __post_init__(self) -> None:
        for name in ("num_ranks", "num_nodes", "slots_per_rank"):
            value = _integer(name, getattr(self, name))
            if value < 1:
                raise ConfigError(f"{name} must be an integer of at least 1, got {value}", field=name)
            object.__setattr__(self, name, value)
        if self.num_ranks % self.num_nodes:
            raise ConfigError(
                f"num_ranks must be a multiple of num_nodes, got num_ranks={self.num_ranks}, "
                f"num_nodes={self.num_nodes}",
                field="num_nodes",
            )

    @classmethod
    def for_experts(
        cls, num_logical_experts: int, num_redundant_experts: int, num_ranks: int, num_nodes: int = 1
    ) -> EpTopology:
        """The topology that holds ``num_logical_experts + num_redundant_experts`` slots on ``num_ranks`` ranks.

        Raises:
            ConfigError: the slots do not divide evenly over the ranks; the message names the nearest count that does.
        """
        num_logical_experts = _integer("num_logical_experts", num_logical_experts)
        num_redundant_experts = _integer("num_redundant_experts", num_redundant_experts)
        num_ranks = _integer("num_ranks", num_ranks)
        if num_logical_experts < 1:
            raise ConfigError(
                f"num_logical_experts must be at least 1, got {num_logical_experts}",
                field="num_logical_experts",
            )
        if num_redundant_experts < 0:
            raise ConfigError(
                f"num_redundant_experts must not be negative, got {num_redundant_experts}",
                field="num_redundant_experts",
            )
        if num_ranks < 1:
            raise ConfigError(f"num_ranks must be at least 1, got {num_ranks}", field="num_ranks")
        num_slots = num_logical_experts + num_redundant_experts
        if num_slots % num_ranks:
            fitting = -num_slots % num_ranks + num_redundant_experts
            raise ConfigError(
                f"the number of physical experts must divide evenly over the ranks: {num_logical_experts} logical + "
                f"{num_redundant_experts} redundant = {num_slots} slots on num_ranks={num_ranks}; "
                f"num_redundant_experts={fitting} would do",
                field="num_redundant_experts",
            )
        return cls(num_ranks, num_nodes, num_slots // num_ranks)

    @property
    def num_slots(self) -> int:
        """Physical experts in a layer, ``P``."""
        return self.num_ranks * self.slots_per_rank

    @property
    def ranks_per_node(self) -> int:
        return self.num_ranks // self.num_nodes

    @property
    def slots_per_node(self) -> int:
        return self.ranks_per_node * self.slots_per_rank

    def rank_of_slot(self, slot: int) -> int:
        return slot // self.slots_per_rank

    def node_of_rank(self, rank: int) -> int:
        return rank // self.ranks_per_node

    def node_of_slot(self, slot: int) -> int:
        return slot // self.slots_per_node

    def local_slot(self, slot: int) -> int:
        """Index of ``slot`` among the slots of its rank: its row in the rank's weight tensors."""
        return slot % self.slots_per_rank

    def slots_of_rank(self, rank: int) -> range:
        return range(rank * self.slots_per_rank, (rank + 1) * self.slots_per_rank)

    def ranks_of_node(self, node: int) -> range:
        return range(node * self.ranks_per_node, (node + 1) * self.ranks_per_node)

    def live_mask(self, live_ranks: Collection[int] | None) -> np.ndarray:
        """(G,) bool: which ranks are among ``live_ranks``, numbers in [0, G); all of them for None.

        Planner, dispatch and transfer take the same ``live_ranks``, and all of them read it by this.

        Raises:
            ConfigError: no rank, or one outside [0, G).
        """
        if live_ranks is None:
            return np.ones(self.num_ranks, dtype=bool)
        ranks = sorted(_integer("each of live_ranks", rank, field="live_ranks") for rank in live_ranks)
        if not ranks or ranks[0] < 0 or ranks[-1] >= self.num_ranks:
            raise ConfigError(f"live_ranks must be some of 0 to {self.num_ranks - 1}, got {ranks}", field="live_ranks")
        return np.isin(np.arange(self.num_ranks), ranks)

    def same_node(self, rank_a: int, rank_b: int) -> bool:
        return self.node_of_rank(rank_a) == self.node_of_rank(rank_b)


def _integer(name: str, value: object, *, field: str | None = None) -> int:
    """``value`` as Python's int: numpy's overflow in products, and are no JSON."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ConfigError(f"{name} must be an integer, got {value!r}", field=field or name)
    return int(value)
