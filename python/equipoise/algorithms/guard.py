"""Keeps the placement in force where a plan cannot be expected to do better on what comes.

A search always finds something that looks better on the windows that it was made from. Three candidates, the placement
in force, the same with new shares, and the plan, are judged on draws of the next window (forecast/outlook.py), and a
layer takes the best one. So no plan is expected to end below leaving things alone.

Where windows differ by counting noise alone, there is another reason to stay: a placement that was fitted to as many
windows as there are would itself be off by the forecast's error, so one that is off by about twice that is as good as
any. Each replan is another chance to mistake noise for a gain; so once the history is long, moves need more evidence.
"""

from __future__ import annotations

import math

import numpy as np

from equipoise.algorithms.forecast.outlook import NUM_DRAWS, judge, lanes_of_draws, level_prior, normal_numbers
from equipoise.algorithms.forecast.scenarios import mean_load
from equipoise.algorithms.task import Task

MIN_EXCESS_ONE = 3.0  # of rank loads' variance over the forecast's error, for moves: where there is one window
MIN_EXCESS = 7.0  # the same where steady load has a history that is longer than MANY_WINDOWS
MANY_WINDOWS = 4
MIN_HEIGHT = 3.0  # standard deviations above sqrt(2 ln G), the expected largest of G: such a rank is hot all the same


Plan = tuple[np.ndarray, np.ndarray]  # (L, P) experts, (L, P) shares


def keep_what_is_better(task: Task, *plans: Plan) -> Plan:
    """The placement in force or one of ``plans``, layer by layer: what is better on draws of what comes.

    Layers whose placement in force is not valid (an expert without a live replica, two replicas on one rank, a group
    on two nodes) take the last plan.
    """
    if not task.noise_is_known:
        return plans[-1]
    stay = (task.old, task.old_share)
    excess, highest, (value, *others) = _judged(task, stay, *plans)
    allowed = _moves_allowed(task, excess, highest)
    placed, share = (array.copy() for array in stay)
    for (new, new_share), new_value in zip(plans, others, strict=True):
        # Of one window's noise, shares that were fitted to it are as much a part as moves.
        free = (new == task.old).all(1) & (task.problem.load.shape[0] > 1)
        better = (new_value > value) & (allowed | free)
        placed[better], share[better], value[better] = new[better], new_share[better], new_value[better]
    invalid = ~_valid(task)
    placed[invalid], share[invalid] = plans[-1][0][invalid], plans[-1][1][invalid]
    return placed, share


def _judged(task: Task, *plans: Plan) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Excess and height of the placement in force (see ``level_prior``), and (L,) expected balance of each plan."""
    known, layers = task.scenarios, task.layers
    mean = mean_load(known.tokens, known.weight)
    factor, (excess, highest) = np.empty_like(mean), np.empty((2, len(mean)))
    num_ranks = len(layers.inverse_speed)
    task.run(level_prior, task.old, task.old_share, mean, known.error, num_ranks, factor, excess, highest)
    tokens = known.tokens * factor[..., None]
    # A scenario is itself a window, or a few: its own error is part of how it differs from what comes.
    noise = known.noise - known.error if task.problem.load.shape[0] > 1 else known.noise
    normal, lanes = normal_numbers(mean.shape[1]), lanes_of_draws(known.weight)
    values = []
    for placed, share in plans:
        balance = np.empty((len(mean), NUM_DRAWS))
        task.run(judge, placed, share, tokens, noise, layers.inverse_speed, normal, lanes, balance)
        values.append(balance.mean(1))
    return excess, highest, values


def _moves_allowed(task: Task, excess: np.ndarray, highest: np.ndarray) -> np.ndarray:
    """(L,) whether what is uneven is more than noise."""
    num_windows = task.problem.load.shape[0]
    if num_windows > 1 and not (task.scenarios.steady and num_windows > MANY_WINDOWS):
        return np.ones(len(excess), dtype=np.bool_)
    least = MIN_EXCESS_ONE if num_windows == 1 else MIN_EXCESS
    height = math.sqrt(2.0 * math.log(max(len(task.layers.inverse_speed), 2))) + MIN_HEIGHT
    return (excess > least) | (highest > height)


def _valid(task: Task) -> np.ndarray:
    """(L,) whether the placement in force may stay as it is."""
    inverse_speed, num_groups = task.layers.inverse_speed, task.num_groups
    num_layers, num_slots = task.old.shape
    by_rank = np.sort(task.old.reshape(num_layers, len(inverse_speed), -1), axis=2)
    valid = ~(np.diff(by_rank, axis=2) == 0).any((1, 2)) & bool((inverse_speed > 0).all())
    if num_groups:
        group = task.old * num_groups // task.problem.num_logical_experts
        node = np.arange(num_slots) // (num_slots // task.problem.topology.num_nodes)
        for layer in range(num_layers):
            pairs = np.unique(np.stack([group[layer], node]), axis=1)
            valid[layer] &= pairs.shape[1] == num_groups
    return valid
