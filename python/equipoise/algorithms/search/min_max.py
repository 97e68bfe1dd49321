"""Minimises the maximum rank load of a fixed placement exactly, by choice of shares alone.

The shares that minimise the largest load of a bipartite graph of experts and ranks are a flow. Load goes from the
hottest rank along a chain of replicas to a cooler one, until the ranks that it can reach are level. Those form the
certificate: every expert with a share on one of them has all its replicas among them, so their mean load is a lower
bound that no choice of shares beats.
"""

from __future__ import annotations

import numpy as np

from equipoise.algorithms.search.layer_state import COUNT, FIRST, INVERSE_SPEED, LayerState, add_share
from equipoise.jit.compile import helper, int_zeros, number

_LEVEL = 1e-9  # relative: ranks closer than this are level


@helper
def level_ranks(state: LayerState) -> None:
    """Lowers the maximum rank load of the first scenario to its least possible value, in place.

    Other loads change only along the way; ``cost`` and ``slope`` are left stale.
    """
    expert, _, share, _, _, ranks, experts, _ = state
    num_ranks = ranks.shape[0]
    size = expert.shape[0] // num_ranks
    give, take = int_zeros(num_ranks), int_zeros(num_ranks)  # edge into a reached rank
    reached, queue = int_zeros(num_ranks), int_zeros(num_ranks)
    for _ in range(20 * num_ranks + 4 * expert.shape[0]):
        hottest = number(0)
        for rank in range(num_ranks):
            if ranks[rank, 0] > ranks[hottest, 0]:
                hottest = rank
        top = ranks[hottest, 0]
        coolest, tokens, capacity = hottest, 0.0, 0.0
        for i in range(reach(state, hottest, reached, queue, give, take)):
            rank = queue[i]
            tokens += ranks[rank, 0] / ranks[rank, INVERSE_SPEED]
            capacity += 1.0 / ranks[rank, INVERSE_SPEED]
            if ranks[rank, 0] < ranks[coolest, 0]:
                coolest = rank
        mean = tokens / capacity
        if top - mean <= _LEVEL * top or coolest == hottest:
            return
        flow = min(
            (top - mean) / ranks[hottest, INVERSE_SPEED], (mean - ranks[coolest, 0]) / ranks[coolest, INVERSE_SPEED]
        )
        rank = coolest
        while rank != hottest:
            flow = min(flow, share[give[rank]] * experts[expert[give[rank]], 0])
            rank = give[rank] // size
        rank = coolest
        while rank != hottest:
            part = min(flow / experts[expert[give[rank]], 0], share[give[rank]])
            add_share(expert, share, ranks, experts, take[rank], part)
            add_share(expert, share, ranks, experts, give[rank], -part)
            rank = give[rank] // size


@helper
def reach(
    state: LayerState, start: int, reached: np.ndarray, queue: np.ndarray, give: np.ndarray, take: np.ndarray
) -> int:
    """Fills ``queue`` with the ranks that load can flow to from ``start``, the nearest first; how many.

    ``reached`` (G,) becomes 1 for them, ``give`` and ``take`` (G,) the slots that the last step of the way is between.
    """
    expert, following, share, replicas, _, ranks, experts, _ = state
    size = expert.shape[0] // ranks.shape[0]
    least = _LEVEL * ranks[start, 0]
    for rank in range(ranks.shape[0]):
        reached[rank] = 0
    reached[start] = 1
    queue[0] = start
    head, tail = 0, 1
    while head < tail:
        rank = queue[head]
        head += 1
        for slot in range(rank * size, (rank + 1) * size):
            e = expert[slot]
            if replicas[e, COUNT] < 2 or share[slot] * experts[e, 0] <= least:
                continue
            other = replicas[e, FIRST]
            while other >= 0:
                target = other // size
                if reached[target] == 0:
                    reached[target] = 1
                    give[target], take[target] = slot, other
                    queue[tail] = target
                    tail += 1
                other = following[other]
    return tail
