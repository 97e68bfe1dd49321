"""DispatchPolicy: how a batch's tokens choose among replicas, as data; and the integers that kernels read of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np

from equipoise.config import DispatchAlgorithm, DispatchScope, EplbConfig
from equipoise.dispatch.solver.controls import (
    ACTIVE_COST,
    CROSS_COST,
    HOME_FIRST,
    HOME_LAST,
    ITERATIONS,
    MIN_SWEEP_TOKENS,
    NUM_CONTROLS,
    ROTATION,
    ROTATION_MASK,
    SEES_ALL,
    SWEEPS,
)
from equipoise.errors import ConfigError
from equipoise.topology import EpTopology

_MAX_ACTIVE_COST = 1 << 26
_SWEPT_TOKENS_PER_RANK = 7


@dataclass(frozen=True)
class DispatchPolicy:
    """What decides among the replicas of an expert.

    Raises:
        ConfigError: a value out of range.
    """

    algorithm: DispatchAlgorithm = "dynamic"
    """``static``: the nearest replica; ``dynamic``: replicas take turns by planned weight; ``batch``: shares solved on
    the tokens at hand."""

    scope: DispatchScope = "rank"
    """Whose tokens ``batch`` looks at: the own ones, those of the own node, or all."""

    active_expert_cost: float = 0.0
    """What an activated expert costs its rank beside its tokens, in tokens."""

    cross_node_cost: float = 0.0
    """What sending a token to another node costs, in parts of computing it; ``batch`` in scope rank or node."""

    iterations: int = 16
    """Steps of the parallel solver; each is one sum over ranks."""

    sweeps: int = 1
    """Passes of coordinate descent in whole tokens that follow."""

    def __post_init__(self) -> None:
        if self.algorithm not in get_args(DispatchAlgorithm):
            raise ConfigError(
                f"ep_dispatch_algorithm must be one of {', '.join(get_args(DispatchAlgorithm))}, "
                f"got {self.algorithm!r}",
                field="ep_dispatch_algorithm",
            )
        if self.scope not in get_args(DispatchScope):
            raise ConfigError(
                f"ep_dispatch_scope must be one of {', '.join(get_args(DispatchScope))}, got {self.scope!r}",
                field="ep_dispatch_scope",
            )
        for name in ("active_expert_cost", "cross_node_cost"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ConfigError(
                    f"ep_dispatch_{name} must be a finite number of at least 0, got {value!r}",
                    field=f"ep_dispatch_{name}",
                )
        if self.cross_node_cost and self.scope == "all":
            raise ConfigError(
                "ep_dispatch_cross_node_cost needs ep_dispatch_scope rank or node: shares of all ranks' tokens do not "
                f"say which of them cross (got {self.cross_node_cost} with ep_dispatch_scope 'all')",
                field="ep_dispatch_cross_node_cost",
            )

    @classmethod
    def from_config(cls, config: EplbConfig, *, active_expert_cost: float = 0.0) -> DispatchPolicy:
        """The policy that the options name; ``active_expert_cost`` stands for ``auto``."""
        cost = config.ep_dispatch_active_expert_cost
        return cls(
            algorithm=config.ep_dispatch_algorithm,
            scope=config.ep_dispatch_scope,
            active_expert_cost=active_expert_cost if cost == "auto" else float(cost),
            cross_node_cost=config.ep_dispatch_cross_node_cost,
        )

    def num_scopes(self, topology: EpTopology) -> int:
        """Parts into which the ranks fall; each solves for its own tokens."""
        return {"rank": topology.num_ranks, "node": topology.num_nodes, "all": 1}[self.scope]

    def ranks_of_scope(self, topology: EpTopology, rank: int) -> range:
        """The ranks whose tokens are solved together with those of ``rank``."""
        size = topology.num_ranks // self.num_scopes(topology)
        first = rank // size * size
        return range(first, first + size)

    def controls(self, topology: EpTopology, rank: int, *, step: int = 0) -> np.ndarray:
        """(NUM_CONTROLS,) int32 for the scope of ``rank``; the same on all its ranks."""
        num_scopes = self.num_scopes(topology)
        scope = rank * num_scopes // topology.num_ranks
        node = topology.ranks_of_node(topology.node_of_rank(rank))
        controls = np.zeros(NUM_CONTROLS, dtype=np.int32)
        controls[ROTATION] = (scope + step * num_scopes) & ROTATION_MASK
        controls[ITERATIONS] = self.iterations
        controls[SWEEPS] = self.sweeps
        # Alone with a handful of tokens, a rank sweeps to the same few ranks as every other; rounding spreads them.
        controls[MIN_SWEEP_TOKENS] = _SWEPT_TOKENS_PER_RANK * topology.num_ranks if self.scope == "rank" else 0
        # The other scopes will open the same replicas, so each of them pays its part.
        controls[ACTIVE_COST] = min(round(self.active_expert_cost * 16 / num_scopes), _MAX_ACTIVE_COST)
        controls[CROSS_COST] = min(round(self.cross_node_cost * 65536), 1 << 24)
        controls[HOME_FIRST], controls[HOME_LAST] = node.start, node.stop
        controls[SEES_ALL] = num_scopes == 1
        return controls
