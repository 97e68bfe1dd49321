"""Packs all layers from scratch, for the priced search to start from.

Where load is of a few kinds that come back, a second packing knows which experts peak together (lpt_packing.py), and a
layer takes the one whose worst ranks are cooler over the scenarios.
"""

from __future__ import annotations

import numpy as np

from equipoise.algorithms.search.lpt_packing import pack, pack_groups, risk_load, worst_loads
from equipoise.algorithms.task import Layers, Task
from equipoise.jit.compile import int_zeros, kernel

NUM_FLATNESS = 3  # ways to count replicas: by load, by its power .75, by its root


def pack_from_scratch(task: Task, flatness: int) -> tuple[np.ndarray, np.ndarray]:
    """(L, P) experts, packed from scratch; (L,) bool, False where a node has too few live slots for its groups.

    ``flatness``, up to :data:`NUM_FLATNESS`, gives fewer replicas to the hottest experts and more to the next.
    """
    fresh, enough = task.old.copy(), np.zeros(len(task.old), dtype=np.bool_)
    task.run(_pack_layers, fresh, enough, task.layers, flatness)
    return fresh, enough


@kernel
def _pack_layers(first: int, last: int, placed: np.ndarray, enough: np.ndarray, layers: Layers, flatness: int) -> None:
    """Packs rows first..last-1 of ``placed`` from scratch; ``enough`` is False where a node has too few live slots."""
    experts, inverse_speed, num_groups = layers.experts, layers.inverse_speed, layers.num_groups
    num_experts, num_ranks = experts.shape[1], inverse_speed.shape[0]
    domain = layers.ranks_per_node if num_groups > 0 else num_ranks
    size, num_domains = placed.shape[1] // num_ranks, num_ranks // domain
    ranks, mine, other = int_zeros(domain), int_zeros(num_experts), int_zeros(placed.shape[1])
    for layer in range(first, last):
        for slot in range(other.shape[0]):
            other[slot] = placed[layer, slot]
        load = risk_load(experts[layer], layers.weight)
        node_of = int_zeros(num_experts)
        if num_groups > 0:
            node_of = pack_groups(load, num_groups, num_domains)
        enough[layer] = True
        for block in range(num_domains):
            num_live, num_mine = 0, 0
            for rank in range(block * domain, (block + 1) * domain):
                if inverse_speed[rank] > 0.0:
                    ranks[num_live] = rank
                    num_live += 1
            for e in range(num_experts):
                if node_of[e] == block:
                    mine[num_mine] = e
                    num_mine += 1
            if num_live * size < num_mine:
                enough[layer] = False
            else:
                for peaks in range(2 if layers.peaks else 1):
                    out = other if peaks else placed[layer]
                    pack(
                        mine[:num_mine],
                        load,
                        experts[layer],
                        layers.weight,
                        ranks[:num_live],
                        inverse_speed,
                        size,
                        flatness,
                        peaks == 1,
                        out,
                    )
        if layers.peaks and enough[layer]:
            before = worst_loads(placed[layer], experts[layer], layers.weight, inverse_speed)
            if worst_loads(other, experts[layer], layers.weight, inverse_speed) < before:
                for slot in range(other.shape[0]):
                    placed[layer, slot] = other[slot]
