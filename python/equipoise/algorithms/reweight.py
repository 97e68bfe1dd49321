"""`reweight`: dispatch weights for the placement in force; no slot changes.

Coordinate descent on the shares, for the load to come, as in `equipoise` (scenarios.py, shares.py), with an exponent of
the power-sum surrogate that fits how far off the forecast is (risk.py). A single window is no sample to spread risk
over: there they are the exact minimum of the maximum for the placement (min_max.py).
"""

from __future__ import annotations

import math

import numpy as np

from equipoise.algorithms.guard import keep_what_is_better, what_is_worth_a_search
from equipoise.algorithms.problem import PlacementProblem, Solution
from equipoise.algorithms.search.layer_state import new_state
from equipoise.algorithms.search.repair import lost_experts, spread_shares
from equipoise.algorithms.search.shares import optimise_shares
from equipoise.algorithms.task import Layers, Task
from equipoise.errors import ConfigError
from equipoise.jit.compile import kernel, number

ALONE = 0.35  # of the exponent that fits the forecast's error, where weights alone are solved: ranks stay uneven anyway
FINE, COARSE = 1e-6, 1e-3  # of the cost, that a round of the descent has to gain; coarse where all change is counting


def solve(problem: PlacementProblem) -> Solution:
    """Re-solves the dispatch weights of the current placement, contiguous if there is none; no slot changes.

    Raises:
        ConfigError: an expert has no replica on a rank with a capacity above 0.
    """
    task = Task.of(problem)
    if problem.current is None:
        return task.finish(task.old, solve_shares(task))
    share, open_layers = task.old_share.copy(), np.flatnonzero(what_is_worth_a_search(task).shares)
    if open_layers.size:
        share[open_layers] = better_shares(task.take(open_layers))
    return task.finish(task.old, share)


def better_shares(task: Task) -> np.ndarray:
    """(L, P) shares of the placement in force: new ones where they may be expected to do better than those it has."""
    return keep_what_is_better(task, (task.old, solve_shares(task)))[1]


def solve_shares(task: Task) -> np.ndarray:
    """(L, P) shares of the placement in force, for the load to come.

    Raises:
        ConfigError: an expert has no replica on a rank with a capacity above 0.
    """
    share, lost = task.old_share.copy(), np.zeros(len(task.old), dtype=np.int64)
    doublings = np.frexp(np.maximum(task.exponent * ALONE, 2.0) * math.sqrt(2.0))[1].astype(np.int64) - 1  # nearest
    # Dispatch by the batch starts from these shares, with a fixed number of steps: finer ones show.
    tolerance = COARSE if task.scenarios.steady and task.problem.dispatch != "batch" else FINE
    task.run(_weigh_layers, task.old, share, task.layers, doublings, tolerance, lost)
    if lost.any():
        raise ConfigError(
            f"rank_capacity leaves experts of layer {int(np.flatnonzero(lost)[0])} without a live rank, and weights "
            f"alone cannot bring them back",
            field="rank_capacity",
        )
    return share


@kernel
def _weigh_layers(
    first: int,
    last: int,
    placed: np.ndarray,
    share: np.ndarray,
    layers: Layers,
    doublings: np.ndarray,
    tolerance: float,
    lost: np.ndarray,
) -> None:
    """Re-solves rows first..last-1 of ``share`` (L, P), in place, with exponents ``2 ** doublings`` (L,).

    ``lost`` (L,) takes the number of experts without a live rank.
    """
    for layer in range(first, last):
        state = new_state(placed[layer], share[layer], layers.experts[layer], layers.weight, layers.inverse_speed)
        lost[layer] = lost_experts(state)
        if lost[layer] == 0:
            spread_shares(state)
            optimise_shares(state, doublings[layer], number(40), tolerance)
