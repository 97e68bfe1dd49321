"""PlacementProblem: what a placement algorithm is asked, checked once, so that a solver only solves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from equipoise.errors import ConfigError, PlacementError
from equipoise.topology import EpTopology

if TYPE_CHECKING:  # solvers know numpy only: the process that compiles them need not load torch
    from equipoise.placement.metadata import ExpertLocationMetadata

DEFAULT_MOVE_PRICE = 0.12


class Solution(NamedTuple):
    """A solver's answer."""

    physical_to_logical_map: np.ndarray  # (L, P) int64
    dispatch_weights: np.ndarray | None = None  # (L, P) float; None: uniform over an expert's replicas


@dataclass(frozen=True)
class PlacementProblem:
    """Load, ranks, and what is in force now.

    Attributes:
        load: (T, L, E) float64 tokens per expert in each of T windows, oldest first.
        topology: ranks, nodes and slots.
        current: the placement in force, with its dispatch weights; None when there is none yet.
        num_groups: expert groups of group-limited routing: ``E / num_groups`` consecutive experts each, all replicas
            of a group on one node. None: experts go anywhere.
        max_moves_per_layer: most slots of a layer whose expert may change; None: no limit.
        rank_capacity: (G,) float64 relative speed of each rank, 0 for a rank that is gone; None: all alike.
        move_price: balance that moving every slot of a layer within its node would have to gain to be worth it.
        num_threads: threads that solve layers side by side; the answer does not depend on it.
    """

    load: np.ndarray
    topology: EpTopology
    current: ExpertLocationMetadata | None
    num_groups: int | None
    max_moves_per_layer: int | None
    rank_capacity: np.ndarray | None
    move_price: float
    num_threads: int

    @classmethod
    def check(
        cls,
        load: np.ndarray,
        topology: EpTopology,
        *,
        current: ExpertLocationMetadata | None,
        num_groups: int | None,
        max_moves_per_layer: int | None,
        rank_capacity: npt.ArrayLike | None,
        move_price: float,
        num_threads: int,
    ) -> PlacementProblem:
        """Builds a problem from what a caller handed in; ``load`` from ``as_load_array``.

        Raises:
            ConfigError: too few slots, groups that do not divide the experts, a negative limit, price or capacity.
            PlacementError: ``current`` has another topology or other sizes than the load.
        """
        if load.ndim == 2:
            load = load[None]
        num_layers, num_experts = load.shape[1:]
        if topology.num_slots < num_experts:
            raise ConfigError(
                f"{num_experts} logical experts do not fit into {topology.num_slots} slots "
                f"({topology.num_ranks} ranks of slots_per_rank={topology.slots_per_rank})",
                field="slots_per_rank",
            )
        if num_groups is not None and (num_groups < 1 or num_experts % num_groups):
            raise ConfigError(
                f"num_groups must divide the {num_experts} logical experts, got num_groups={num_groups}",
                field="num_groups",
            )
        if max_moves_per_layer is not None and max_moves_per_layer < 0:
            raise ConfigError(
                f"max_moves_per_layer must not be negative, got {max_moves_per_layer}", field="max_moves_per_layer"
            )
        if not (np.isfinite(move_price) and move_price >= 0):
            raise ConfigError(f"move_price must be finite and not negative, got {move_price}", field="move_price")
        if num_threads < 1:
            raise ConfigError(f"num_threads must be at least 1, got {num_threads}", field="num_threads")
        if current is not None:
            theirs = (current.topology, current.num_layers, current.num_logical_experts)
            if theirs != (topology, num_layers, num_experts):
                raise PlacementError(
                    f"current does not fit the problem: (topology, layers, logical experts) is {theirs}, "
                    f"asked for {(topology, num_layers, num_experts)}",
                    field="current",
                )
        return cls(
            np.ascontiguousarray(load),
            topology,
            current,
            num_groups,
            max_moves_per_layer,
            _checked_capacity(rank_capacity, topology, num_experts),
            float(move_price),
            num_threads,
        )

    @property
    def num_layers(self) -> int:
        return self.load.shape[1]

    @property
    def num_logical_experts(self) -> int:
        return self.load.shape[2]

    @property
    def grouped(self) -> bool:
        """Whether expert groups can be kept whole on nodes: they are asked for and divide evenly over several."""
        num_nodes = self.topology.num_nodes
        return self.num_groups is not None and num_nodes > 1 and self.num_groups % num_nodes == 0

    @property
    def current_map(self) -> np.ndarray | None:
        """(L, P) int64 map in force."""
        return None if self.current is None else self.current.physical_to_logical_map.cpu().numpy()


def _checked_capacity(rank_capacity: npt.ArrayLike | None, topology: EpTopology, num_experts: int) -> np.ndarray | None:
    if rank_capacity is None:
        return None
    try:
        capacity = np.asarray(rank_capacity, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"rank_capacity must hold numbers: {error}", field="rank_capacity") from None
    if capacity.shape != (topology.num_ranks,):
        raise ConfigError(
            f"rank_capacity must hold one number for each of {topology.num_ranks} ranks, got shape {capacity.shape}",
            field="rank_capacity",
        )
    if not (np.isfinite(capacity) & (capacity >= 0)).all():
        raise ConfigError(
            f"rank_capacity must be finite and not negative, got {capacity.tolist()}", field="rank_capacity"
        )
    live_slots = int((capacity > 0).sum()) * topology.slots_per_rank
    if live_slots < num_experts:
        raise ConfigError(
            f"{num_experts} logical experts do not fit into the {live_slots} slots of the "
            f"{int((capacity > 0).sum())} ranks whose rank_capacity is above 0",
            field="rank_capacity",
        )
    return capacity
