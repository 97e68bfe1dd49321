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
    placed, share = task.old.copy(), task.old_share.copy()
    num_layers, num_slots = placed.shape
    num_experts, num_ranks = task.problem.num_logical_experts, len(task.layers.inverse_speed)
    size = num_slots // num_ranks
    by_rank = np.sort(placed.reshape(num_layers, num_ranks, size), axis=2)
    layers = np.flatnonzero((np.diff(by_rank, axis=2) == 0).any((1, 2)))
    if not layers.size:
        return placed, share
    mean = mean_load(task.scenarios.tokens, task.scenarios.weight)
    node_of_slot = np.arange(num_slots) // (num_slots // task.problem.topology.num_nodes)
    group = np.arange(num_experts) * task.num_groups // num_experts
    limit = task.problem.max_moves_per_layer
    for layer in layers:
        room = num_slots if limit is None else limit
        count = np.bincount(placed[layer], minlength=num_experts)
        for slot in range(num_slots):
            first = slot // size * size
            here = placed[layer, first : first + size]
            twin = first + int(np.flatnonzero(here == placed[layer, slot])[0])
            if twin == slot or room == 0:
                continue
            per_replica = mean[layer] / (count + 1)
            per_replica[here] = -1.0
            if task.num_groups:
                at_node = np.isin(group, group[placed[layer, node_of_slot == node_of_slot[slot]]])
                per_replica[~at_node] = -1.0
            best = int(per_replica.argmax())
            if per_replica[best] >= 0.0:
                count[placed[layer, slot]] -= 1
                count[best] += 1
                share[layer, twin] += share[layer, slot]
                placed[layer, slot], share[layer, slot] = best, 0.0
                room -= 1
    if task.problem.dispatch == "even":
        counts = np.stack([np.bincount(row, minlength=num_experts) for row in placed])
        share = 1.0 / np.take_along_axis(counts, placed, axis=1)
    return placed, share
