"""PlacementProblem: what a placement algorithm is asked, checked once, so that a solver only solves."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from equipoise.config import EplbConfig
from equipoise.errors import ConfigError, PlacementError
from equipoise.topology import EpTopology

if TYPE_CHECKING:  # solvers know numpy only: the process that compiles them need not load torch
    from equipoise.placement.metadata import ExpertLocationMetadata

DEFAULT_MOVE_PRICE = EplbConfig.eplb_move_price

DispatchKind = Literal["even", "weights", "batch"]
"""How tokens are split over replicas: alike; by shares solved with the plan; by shares solved on each batch."""
DISPATCH_KINDS: tuple[DispatchKind, ...] = get_args(DispatchKind)


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
        dispatch: the kind of dispatch that will use the placement.
        tokens_per_step: tokens that the ranks of a forward pass route together; None: not known.
    """

    load: np.ndarray
    topology: EpTopology
    current: ExpertLocationMetadata | None
    num_groups: int | None
    max_moves_per_layer: int | None
    rank_capacity: np.ndarray | None
    move_price: float
    num_threads: int
    dispatch: DispatchKind = "weights"
    tokens_per_step: int | None = None

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
        live_ranks: Collection[int] | None = None,
        move_price: float,
        num_threads: int,
        dispatch: DispatchKind = "weights",
        tokens_per_step: int | None = None,
    ) -> PlacementProblem:
        """Builds a problem from what a caller handed in; ``load`` from ``as_load_array``.

        Raises:
            ConfigError: too few slots, groups that do not divide the experts, a negative limit, price or capacity.
            PlacementError: ``current`` has another topology or other sizes than the load.
        """
        problem = cls(
            np.ascontiguousarray(load[None] if load.ndim == 2 else load),
            topology,
            current,
            num_groups,
            max_moves_per_layer,
            _checked_capacity(rank_capacity, live_ranks, topology, load.shape[-1]),
            move_price,
            num_threads,
            dispatch,
            tokens_per_step,
        )
        problem._check_sizes()
        problem._check_options()
        return problem

    def _check_sizes(self) -> None:
        num_layers, num_experts, topology = self.num_layers, self.num_logical_experts, self.topology
        if topology.num_slots < num_experts:
            raise ConfigError(
                f"{num_experts} logical experts do not fit into {topology.num_slots} slots "
                f"({topology.num_ranks} ranks of slots_per_rank={topology.slots_per_rank})",
                field="slots_per_rank",
            )
        if self.num_groups is not None and (self.num_groups < 1 or num_experts % self.num_groups):
            raise ConfigError(
                f"num_groups must divide the {num_experts} logical experts, got num_groups={self.num_groups}",
                field="num_groups",
            )
        if self.current is not None:
            theirs = (self.current.topology, self.current.num_layers, self.current.num_logical_experts)
            if theirs != (topology, num_layers, num_experts):
                raise PlacementError(
                    f"current does not fit the problem: (topology, layers, logical experts) is {theirs}, "
                    f"asked for {(topology, num_layers, num_experts)}",
                    field="current",
                )

    def _check_options(self) -> None:
        limit, price, threads, tokens = (
            self.max_moves_per_layer,
            self.move_price,
            self.num_threads,
            self.tokens_per_step,
        )
        for good, name, value, must in (
            (limit is None or limit >= 0, "max_moves_per_layer", limit, "not be negative"),
            (np.isfinite(price) and price >= 0, "move_price", price, "be finite and not negative"),
            (threads >= 1, "num_threads", threads, "be at least 1"),
            (self.dispatch in DISPATCH_KINDS, "dispatch", self.dispatch, f"be one of {', '.join(DISPATCH_KINDS)}"),
            (tokens is None or tokens >= 1, "tokens_per_step", tokens, "be at least 1"),
        ):
            if not good:
                raise ConfigError(f"{name} must {must}, got {value!r}", field=name)

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


def _checked_capacity(
    rank_capacity: npt.ArrayLike | None,
    live_ranks: Collection[int] | None,
    topology: EpTopology,
    num_experts: int,
) -> np.ndarray | None:
    alive = topology.live_mask(live_ranks)
    if rank_capacity is None and alive.all():
        return None
    try:
        capacity = np.asarray(np.ones(topology.num_ranks) if rank_capacity is None else rank_capacity, dtype=np.float64)
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
    capacity = np.where(alive, capacity, 0.0)
    live_slots = int((capacity > 0).sum()) * topology.slots_per_rank
    if live_slots < num_experts:
        raise ConfigError(
            f"{num_experts} logical experts do not fit into the {live_slots} slots of the "
            f"{int((capacity > 0).sum())} ranks that are live and whose rank_capacity is above 0",
            field="rank_capacity" if live_ranks is None else "live_ranks",
        )
    return capacity
