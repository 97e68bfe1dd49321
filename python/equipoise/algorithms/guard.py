"""Keeps the placement in force where a plan cannot be expected to do better on what comes.

A search always finds something that looks better on the windows that it was made from. Three candidates, the placement
in force, the same with new shares, and the plan, are judged on draws of the next window (forecast/outlook.py), and a
layer takes the best one. So no plan is expected to end below leaving things alone. Of a single window, how much
popularities differ at all is a guess as well: there the gain must be larger than its own standard deviation. Where
the newest window may be a burst (forecast/burst.py), a plan must do no harm to the load before it either, and two such
windows are a single one of each load.

Where windows differ by counting noise alone, there is another reason to stay: a placement that was fitted to as many
windows as there are would itself be off by the forecast's error, so one that is off by about twice that is as good as
any. Each replan is another chance to mistake noise for a gain; so once the history is long, moves need more evidence.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from equipoise.algorithms.forecast.outlook import (
    NUM_DRAWS,
    InForce,
    gaps_between_replicas,
    judge,
    lanes_of_draws,
    level_prior,
    normal_numbers,
)
from equipoise.algorithms.task import Task
from equipoise.algorithms.twins import split_twins, twins_of

MIN_EXCESS = 8.0  # of rank loads' variance over the forecast's error, for moves: where load has been steady for long
LEVEL = 2.0  # the same of a placement that is level enough
NARROW = 0.02  # of a mean rank's load: what ranks that share experts may differ by and be level enough
HARM = 0.002  # balance that a plan may lose on one of two loads of which either may come
SURE_ONE = 1.0  # standard deviations over the draws, that a plan made from one window of a load must gain
MIN_HEIGHT = 3.0  # standard deviations above sqrt(2 ln G), the expected largest of G: such a rank is hot all the same


Plan = tuple[np.ndarray, np.ndarray]  # (L, P) experts, (L, P) shares


def keep_what_is_better(task: Task, *plans: Plan) -> Plan:
    """The placement in force or one of ``plans``, layer by layer: what is better on draws of what comes.

    Two replicas on one rank are split first, with no change to any rank's load. Layers whose placement in force cannot
    stay all the same (an expert without a live replica, a group on two nodes) take the last plan.
    """
    if not task.noise_is_known:
        return plans[-1]
    num_windows, unsure = task.problem.load.shape[0], task.scenarios.unsure
    one_each = num_windows == 1 or (num_windows == 2 and unsure)  # windows of each load that may come
    stay = split_twins(task)
    excess, highest, (drawn, *others) = _judged(task, stay, *plans)
    allowed = _moves_allowed(task, excess, highest)
    mended = (stay[0] != task.old).any(1)
    (placed, share), value = (array.copy() for array in stay), drawn.mean(1)
    for (new, new_share), new_drawn in zip(plans, others, strict=True):
        kept = (new == task.old).all(1)
        gain = new_drawn - drawn
        if unsure:
            gain = np.where((_worst_of_scenarios(task, gain) >= -HARM)[:, None], gain, -1.0)
        new_value = drawn.mean(1) + gain.mean(1) - (SURE_ONE * gain.std(1) if one_each else 0.0)
        better = (new_value > value) & (allowed | kept) & ~(kept & mended)
        placed[better], share[better], value[better] = new[better], new_share[better], new_value[better]
    lost = ~_may_stay(task)
    placed[lost], share[lost] = plans[-1][0][lost], plans[-1][1][lost]
    return placed, share


class Worth(NamedTuple):
    """For what a layer is worth a search."""

    moves: np.ndarray  # (L,) bool
    shares: np.ndarray  # (L,) bool, for other shares alone


def what_is_worth_a_search(task: Task) -> Worth:
    """Tells for each layer whether a plan could be kept, before one is made.

    Any could, where load is not steady or has not been for long. Otherwise ranks that are as level as counting can
    tell offer nothing: the mean square of what their loads are off is about its expected value for a level placement.
    Nor do other shares where ranks that hold the same expert differ by no more than that.
    """
    all_layers = np.ones(len(task.old), dtype=np.bool_)
    ranks_alike = bool((task.layers.inverse_speed == 1.0).all())
    if not (task.steady_for_long and ranks_alike and task.problem.dispatch != "batch"):
        return Worth(all_layers, all_layers)
    _, excess, highest = _level_prior(task)
    broken = ~_may_stay(task) | twins_of(task).any(1)
    uneven = (excess > LEVEL) | (highest > _usual_height(task))
    shares = uneven & may_gain_by_shares(task) if task.problem.dispatch == "weights" else np.zeros_like(uneven)
    return Worth(broken | (uneven & _moves_allowed(task, excess, highest)), broken | shares)


def _worst_of_scenarios(task: Task, gain: np.ndarray) -> np.ndarray:
    """(L,) least mean over the draws of one scenario of ``gain`` (L, NUM_DRAWS)."""
    lanes = lanes_of_draws(task.scenarios.weight)
    return np.min([gain[:, lanes == lane].mean(1) for lane in np.unique(lanes)], axis=0)


def _judged(task: Task, *plans: Plan) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Excess and height of the placement in force (see ``level_prior``), and (L, NUM_DRAWS) balance of each plan."""
    known, layers = task.scenarios, task.layers
    factor, excess, highest = _level_prior(task)
    tokens = known.tokens * factor[..., None]
    # A scenario is itself a window, or a few: its own error is part of how it differs from what comes.
    noise = known.noise - known.error if task.problem.load.shape[0] > 1 else known.noise
    normal, lanes = normal_numbers(tokens.shape[1]), lanes_of_draws(known.weight)
    placed, share = np.stack([plan[0] for plan in plans]), np.stack([plan[1] for plan in plans])
    balance = np.empty((len(plans), len(tokens), NUM_DRAWS))
    task.run(judge, placed, share, tokens, noise, layers.inverse_speed, normal, lanes, balance)
    return excess, highest, list(balance)


def _level_prior(task: Task) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(L, E) factor, (L,) excess, (L,) height of the placement in force, see ``level_prior``."""
    factor, (excess, highest) = np.empty_like(task.mean), np.empty((2, len(task.old)))
    task.run(level_prior, _in_force(task), factor, excess, highest)
    return factor, excess, highest


def _in_force(task: Task) -> InForce:
    return InForce(task.old, task.old_share, task.mean, task.scenarios.error, len(task.layers.inverse_speed))


def may_gain_by_shares(task: Task) -> np.ndarray:
    """(L,) whether ranks that hold the same expert differ by more than noise, or by much."""
    excess, width = np.empty((2, len(task.old)))
    task.run(gaps_between_replicas, _in_force(task), excess, width)
    return (excess > LEVEL) | (width > NARROW)


def _usual_height(task: Task) -> float:
    """Standard deviations that the hottest of all ranks is above the mean by noise alone."""
    return math.sqrt(2.0 * math.log(max(len(task.layers.inverse_speed), 2))) + MIN_HEIGHT


def _moves_allowed(task: Task, excess: np.ndarray, highest: np.ndarray) -> np.ndarray:
    """(L,) whether what is uneven is more than noise."""
    if not task.steady_for_long:
        return np.ones(len(excess), dtype=np.bool_)
    return (excess > MIN_EXCESS) | (highest > _usual_height(task))


def _may_stay(task: Task) -> np.ndarray:
    """(L,) whether the placement in force keeps every expert alive, and every group on one node."""
    inverse_speed, num_groups = task.layers.inverse_speed, task.num_groups
    num_layers, num_slots = task.old.shape
    valid = np.full(num_layers, bool((inverse_speed > 0).all()))
    if num_groups:
        group = task.old * num_groups // task.problem.num_logical_experts
        node = np.arange(num_slots) // (num_slots // task.problem.topology.num_nodes)
        for layer in range(num_layers):
            pairs = np.unique(np.stack([group[layer], node]), axis=1)
            valid[layer] &= pairs.shape[1] == num_groups
    return valid
