"""Plans for dispatch that solves its shares on each batch: the priced search, then connections between closed sets.

The scenarios are those of the forecast with the noise of a batch drawn on top (forecast/outlook.py), so that small
batches get replicas that are useful often, and large ones connectivity. Two starts are improved, the placement in force
and what the priced search made of it, and each layer takes the one that is worth more after its moves are paid for.

What a connection gains does not hang on the forecast of any one expert, so it lasts, where shares that are planned for
a forecast are worth what the next window is like: its moves are priced as serving :data:`LASTS` windows.
"""

from __future__ import annotations

import numpy as np

from equipoise.algorithms.forecast.outlook import lanes_of_draws, normal_numbers
from equipoise.algorithms.improve import LASTS
from equipoise.algorithms.search.move_price import MoveTerms
from equipoise.algorithms.search.recourse import improve_for_batches
from equipoise.algorithms.task import Task

NUM_BATCHES = 24  # draws that a placement is made for
MAX_STEPS = 96


def plan_for_batches(task: Task, placed: np.ndarray, moves: MoveTerms) -> np.ndarray:
    """(L, P) experts, from those of the priced search; no more than ``moves`` allows."""
    loads, layers = batches(task), task.layers
    starts = [placed.copy()]
    # With a rank gone, experts may have no live replica in the placement in force: it would seem to have less load.
    if task.problem.current is not None and (layers.inverse_speed > 0.0).all():
        starts.insert(0, task.old.copy())
    moves = moves._replace(slot_price=moves.slot_price / LASTS)
    best, best_value = placed.copy(), np.full(len(placed), -np.inf)
    for start in starts:
        value = np.empty(len(placed))
        arrays = (task.old, start, value, loads, layers.inverse_speed, layers.ranks_per_node)
        task.run(improve_for_batches, *arrays, moves, MAX_STEPS)
        better = value > best_value
        best[better], best_value[better] = start[better], value[better]
    return best


def batches(task: Task) -> np.ndarray:
    """(L, E, NUM_BATCHES) loads of batches to come, where a mean rank has 1."""
    known, tokens = task.scenarios, task.problem.tokens_per_step
    mean = task.mean
    total = mean.sum(1, keepdims=True)
    noise = np.maximum(known.noise - known.error, 0.0)
    if tokens is not None:
        noise = noise + mean * total / tokens
    half = NUM_BATCHES // 2
    normal = normal_numbers(mean.shape[1])[:half]
    normal = np.concatenate([normal, -normal])
    lanes = lanes_of_draws(known.weight, NUM_BATCHES)
    loads = np.empty((*mean.shape, NUM_BATCHES))
    for draw in range(NUM_BATCHES):
        base = known.tokens[..., lanes[draw]]
        ninth = noise / (9.0 * np.maximum(base, 1e-12) ** 2)
        root = np.maximum(1.0 - ninth + normal[draw] * np.sqrt(ninth), 0.0)
        drawn = base * root**3
        loads[..., draw] = drawn * (total / np.maximum(drawn.sum(1, keepdims=True), 1e-12))
    return loads
