"""The one function that callers use: from load and the placement in force to the placement to come."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from equipoise.algorithms.problem import DEFAULT_MOVE_PRICE, PlacementProblem
from equipoise.algorithms.registry import solver
from equipoise.jit.threads import available_cpus
from equipoise.placement.balancedness import LoadLike, as_load_array
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology


def rebalance_experts(
    load: LoadLike,
    topology: EpTopology,
    *,
    algorithm: str = "auto",
    current: ExpertLocationMetadata | None = None,
    num_groups: int | None = None,
    max_moves_per_layer: int | None = None,
    rank_capacity: npt.ArrayLike | None = None,
    move_price: float = DEFAULT_MOVE_PRICE,
    num_threads: int | None = None,
) -> ExpertLocationMetadata:
    """Computes a placement for the load to come from the load that was.

    Pure: the same arguments give the same placement on any machine and with any number of threads.

    Args:
        load: (L, E) tokens per expert, or (T, L, E) for T windows, oldest first.
        topology: where the ``P >= E`` slots lie.
        algorithm: one of :func:`available_algorithms`, or ``auto``.
        current: the placement in force; algorithms that count moves start from it.
        num_groups: expert groups of group-limited routing; a group's experts then share a node. None: no groups.
        max_moves_per_layer: most slots of a layer that may receive another expert. Holds for every algorithm: a layer
            whose plan an algorithm cannot shorten keeps its current placement. Without ``current`` it says nothing.
        rank_capacity: (G,) relative speed of each rank; 0 for a rank that is gone.
        move_price: balance that moving a whole layer's slots within their nodes must gain to be worth it.
        num_threads: layers solved side by side; None: one thread per CPU this process may use.

    Returns:
        A fresh placement on the CPU, with dispatch weights where the algorithm solves them and uniform ones elsewhere.

    Raises:
        LoadError: NaN, infinite or negative load, or a wrong shape.
        ConfigError: an unknown algorithm, or options that do not fit together; ``field`` names the option.
        PlacementError: ``current`` has other sizes than the load and the topology.
    """
    problem = PlacementProblem.check(
        as_load_array(load),
        topology,
        current=current,
        num_groups=num_groups,
        max_moves_per_layer=max_moves_per_layer,
        rank_capacity=rank_capacity,
        move_price=move_price,
        num_threads=available_cpus() if num_threads is None else num_threads,
    )
    placed, weights = solver(algorithm)(problem)
    if current is not None and max_moves_per_layer is not None:
        placed = _within_limit(placed, problem)
    return ExpertLocationMetadata.from_physical_to_logical(
        placed, problem.num_logical_experts, topology, dispatch_weights=weights
    )


def _within_limit(placed: np.ndarray, problem: PlacementProblem) -> np.ndarray:
    current = problem.current_map
    assert current is not None
    over = (placed != current).sum(1) > problem.max_moves_per_layer
    return np.where(over[:, None], current, placed)
