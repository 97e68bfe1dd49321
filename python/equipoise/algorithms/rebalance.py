"""Computes a placement for the load to come: the one function that callers use."""

from __future__ import annotations

import logging
from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from equipoise.algorithms.problem import DEFAULT_MOVE_PRICE, DispatchKind, PlacementProblem, Solution
from equipoise.algorithms.registry import Algorithm, check_algorithm, find_algorithm
from equipoise.errors import ConfigError
from equipoise.jit.threads import available_cpus
from equipoise.placement.balancedness import LoadLike, as_load_array
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology

_log = logging.getLogger("equipoise.algorithms")


def rebalance_experts(
    load: LoadLike,
    topology: EpTopology,
    *,
    algorithm: str = "auto",
    current: ExpertLocationMetadata | None = None,
    num_groups: int | None = None,
    max_moves_per_layer: int | None = None,
    rank_capacity: npt.ArrayLike | None = None,
    live_ranks: Collection[int] | None = None,
    move_price: float = DEFAULT_MOVE_PRICE,
    dispatch: DispatchKind = "weights",
    tokens_per_step: int | None = None,
    num_threads: int | None = None,
) -> ExpertLocationMetadata:
    """Computes a placement for the load to come: the same on any machine and with any number of threads.

    Args:
        load: (L, E) tokens per expert, or (T, L, E) for T windows, oldest first.
        topology: where the ``P >= E`` slots lie.
        algorithm: one of :func:`available_algorithms`, or ``auto``.
        current: the placement in force; algorithms that count moves start from it.
        num_groups: expert groups of group-limited routing; a group's experts then share a node. None: no groups.
        max_moves_per_layer: most slots of a layer that may receive another expert than in ``current``, for every
            algorithm: a layer whose plan cannot be shortened stays as it is.
        rank_capacity: (G,) relative speed of each rank; 0 for a rank that is gone.
        live_ranks: ranks that are there, as dispatch and ``plan_transfer`` take them; all if None.
        move_price: balance that moving a whole layer's slots within their nodes must gain to be worth it; `equipoise`
            takes .6 of it with two slots a rank and several windows of load, a third with more than four.
        dispatch: how tokens will be split over replicas. ``even``: alike, as engines do that know no weights;
            ``weights``: by the shares that are planned here; ``batch``: by shares solved anew on each batch.
        tokens_per_step: expert choices of a forward pass, all ranks together (tokens times top-k): a batch's noise.
        num_threads: layers solved side by side; None: one thread per CPU this process may use.

    Returns:
        A placement on the CPU, with dispatch weights where the algorithm solves them and uniform ones elsewhere.

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
        live_ranks=live_ranks,
        move_price=move_price,
        dispatch=dispatch,
        tokens_per_step=tokens_per_step,
        num_threads=available_cpus() if num_threads is None else num_threads,
    )
    chosen = find_algorithm(algorithm)
    _check_support(chosen, problem)
    return _metadata_of(_within_limit(chosen.solve(problem), problem), problem)


def _metadata_of(solution: Solution, problem: PlacementProblem) -> ExpertLocationMetadata:
    """Builds the maps of a solution, or copies those in force where it is that: building takes longer."""
    placed, weights = solution
    if problem.current is not None and _is_in_force(placed, weights, problem.current):
        return problem.current.clone("cpu")
    return ExpertLocationMetadata.from_physical_to_logical(
        placed, problem.num_logical_experts, problem.topology, dispatch_weights=weights
    )


def _check_support(algorithm: Algorithm, problem: PlacementProblem) -> None:
    """
    Raises:
        ConfigError: the algorithm cannot honour the kind of dispatch, or ranks of different speed.
    """
    check_algorithm(algorithm.name, dispatch=problem.dispatch)
    capacity = problem.rank_capacity
    if capacity is not None and not algorithm.rank_capacity and (capacity != capacity[0]).any():
        raise ConfigError(
            f"{algorithm.name} knows only ranks of one speed that are all there, got rank_capacity={capacity.tolist()} "
            f"(0: not among live_ranks); equipoise and reweight honour it",
            field="rank_capacity",
        )
    if problem.num_groups not in (None, 1) and problem.topology.num_nodes > 1:
        if not algorithm.groups:
            _log.warning("%s ignores num_groups=%d: experts go to any node", algorithm.name, problem.num_groups)
        elif not problem.grouped:
            _log.warning(
                "num_groups=%d cannot be kept whole on num_nodes=%d, which does not divide it: experts go to any node",
                problem.num_groups,
                problem.topology.num_nodes,
            )


def _is_in_force(placed: np.ndarray, weights: np.ndarray | None, current: ExpertLocationMetadata) -> bool:
    if weights is None or (placed != current.physical_to_logical_map.cpu().numpy()).any():
        return False
    return bool((weights.astype(np.float32) == current.dispatch_weights.cpu().numpy()).all())


def _within_limit(solution: Solution, problem: PlacementProblem) -> Solution:
    """``solution``, where a layer with more changes than are allowed keeps the placement in force and its weights."""
    current, limit = problem.current, problem.max_moves_per_layer
    if current is None or limit is None:
        return solution
    placed, weights = solution
    before = current.physical_to_logical_map.cpu().numpy()
    over = ((placed != before).sum(1) > limit)[:, None]
    if weights is not None:
        weights = np.where(over, current.dispatch_weights.cpu().numpy(), weights)
    return Solution(np.where(over, before, placed), weights)
