"""Splits replicas of one expert that share a rank, with no change to any rank's load.

Published planners make such placements. The second replica of a pair is of no use where it is, and its slot can take
another expert; that this has to happen is no reason to follow a plan that noise has made.
"""

from __future__ import annotations

import numpy as np

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
    node_of_slot = np.arange(num_slots) // (num_slots // task.problem.topology.num_nodes)
    group = np.arange(num_experts) * task.num_groups // num_experts
    limit = task.problem.max_moves_per_layer
    for layer in np.flatnonzero(twins.any(1)):
        room = num_slots if limit is None else limit
        count = np.bincount(placed[layer], minlength=num_experts)
        for slot in np.flatnonzero(twins[layer])[:room]:
            e, first = placed[layer, slot], slot // size * size
            here = placed[layer, first : first + size]
            per_replica = task.mean[layer] / (count + 1)
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
    num_layers, num_slots = task.old.shape
    num_ranks = len(task.layers.inverse_speed)
    # (P / G, L G): numpy compares long rows faster than the few slots of a rank.
    by_place = np.ascontiguousarray(task.old.reshape(num_layers * num_ranks, -1).T)
    twins = np.zeros(by_place.shape, dtype=np.bool_)
    for apart in range(1, len(by_place)):
        twins[apart:] |= by_place[apart:] == by_place[:-apart]
    return twins.T.reshape(num_layers, num_slots)
