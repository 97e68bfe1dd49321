"""Splits replicas of one expert that share a rank, with no change to any rank's load.

Published planners make such placements. The second replica of a pair is of no use where it is, and its slot can take
another expert; that this has to happen is no reason to follow a plan that noise has made.
"""

from __future__ import annotations

import numpy as np

from equipoise.algorithms.forecast.scenarios import mean_load
from equipoise.algorithms.task import Task


def split_twins(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """(L, P) experts and shares of the placement in force, where a rank's second replica has become another expert.

    That is the one with the most load per replica which may be there, with no share yet; the first replica keeps the
    share of both. A replica stays where no expert may take its slot, or ``max_moves_per_layer`` is reached.
    """
    placed, share, twins = task.old.copy(), task.old_share.copy(), twins_of(task)
    if not twins.any():
        return placed, share
    num_slots, num_experts = placed.shape[1], task.problem.num_logical_experts
    size = num_slots // len(task.layers.inverse_speed)
    mean = mean_load(task.scenarios.tokens, task.scenarios.weight)
    node_of_slot = np.arange(num_slots) // (num_slots // task.problem.topology.num_nodes)
    group = np.arange(num_experts) * task.num_groups // num_experts
    limit = task.problem.max_moves_per_layer
    for layer in np.flatnonzero(twins.any(1)):
        room = num_slots if limit is None else limit
        count = np.bincount(placed[layer], minlength=num_experts)
        for slot in np.flatnonzero(twins[layer])[:room]:
            e, first = placed[layer, slot], slot // size * size
            here = placed[layer, first : first + size]
            per_replica = mean[layer] / (count + 1)
            per_replica[here] = -1.0
            if task.num_groups:
                at_node = np.isin(group, group[placed[layer, node_of_slot == node_of_slot[slot]]])
                per_replica[~at_node] = -1.0
            best = int(per_replica.argmax())
            if per_replica[best] < 0.0:
                continue
            count[e] -= 1
            count[best] += 1
            share[layer, first + int(np.flatnonzero(here == e)[0])] += share[layer, slot]
            placed[layer, slot], share[layer, slot] = best, 0.0
    if task.problem.dispatch == "even":
        counts = np.stack([np.bincount(row, minlength=num_experts) for row in placed])
        share = 1.0 / np.take_along_axis(counts, placed, axis=1)
    return placed, share


def twins_of(task: Task) -> np.ndarray:
    """(L, P) bool, slots whose expert is in an earlier slot of their rank as well."""
    by_rank = task.old.reshape(len(task.old), len(task.layers.inverse_speed), -1)
    twins = np.zeros(by_rank.shape, dtype=np.bool_)
    for apart in range(1, by_rank.shape[2]):
        twins[:, :, apart:] |= by_rank[:, :, apart:] == by_rank[:, :, :-apart]
    return twins.reshape(task.old.shape)
