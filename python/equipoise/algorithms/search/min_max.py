"""Minimises the maximum rank load of a fixed placement exactly, by choice of shares alone.

The shares that minimise the largest load of a bipartite graph of experts and ranks are a flow. Load goes from the
hottest rank along a chain of replicas to a cooler one, until the ranks that it can reach are level. Those form the
certificate: every expert with a share on one of them has all its replicas among them, so their mean load is a lower
bound that no choice of shares beats.
"""

from __future__ import annotations

import numpy as np

from equipoise.algorithms.search.layer_state import FIRST, INVERSE_SPEED, LayerState
from equipoise.jit.compile import helper, int_zeros, number, zeros

LEVEL = 1e-9  # relative: ranks closer than this are level, and tokens of a mean rank's load too few to flow


@helper
def level_ranks(state: LayerState, reached: np.ndarray, queue: np.ndarray) -> int:
    """Lowers the maximum rank load of the first scenario to its least possible value, in place.

    ``queue`` (G,) becomes the ranks of the closed set, as many as are returned, ``reached`` (G,) 1 for them. Loads of
    other scenarios, ``cost`` and ``slope`` are left stale.
    """
    expert, following, share, replicas, _, ranks, experts, _ = state
    num_ranks = ranks.shape[0]
    tokens, load, inverse_speed = zeros(expert.shape[0]), zeros(num_ranks), zeros(num_ranks)
    for rank in range(num_ranks):
        inverse_speed[rank] = ranks[rank, INVERSE_SPEED]
        load[rank] = ranks[rank, 0] / inverse_speed[rank] if inverse_speed[rank] > 0.0 else 0.0
    for slot in range(expert.shape[0]):
        tokens[slot] = share[slot] * experts[expert[slot], 0]
    give, take = int_zeros(num_ranks), int_zeros(num_ranks)
    arrays = (expert, following, replicas, inverse_speed, tokens, load, reached, queue, give, take)
    num_closed = level_tokens(*arrays, LEVEL, LEVEL)
    for rank in range(num_ranks):
        ranks[rank, 0] = load[rank] * inverse_speed[rank]
    for slot in range(expert.shape[0]):
        if experts[expert[slot], 0] > 0.0:
            share[slot] = tokens[slot] / experts[expert[slot], 0]
    return num_closed


@helper
def hottest_rank(load: np.ndarray, inverse_speed: np.ndarray) -> int:
    """The rank that ends last."""
    hottest = number(0)
    for rank in range(load.shape[0]):
        if load[rank] * inverse_speed[rank] > load[hottest] * inverse_speed[hottest]:
            hottest = rank
    return hottest


@helper
def level_tokens(
    expert: np.ndarray,
    following: np.ndarray,
    replicas: np.ndarray,
    inverse_speed: np.ndarray,
    tokens: np.ndarray,
    load: np.ndarray,
    reached: np.ndarray,
    queue: np.ndarray,
    give: np.ndarray,
    take: np.ndarray,
    tolerance: float,
    least: float,
) -> int:
    """Lowers the largest of ``load`` (G,) times ``inverse_speed`` to its least value, in place, as ``tokens`` (P,).

    It may end ``tolerance`` above it, relatively. ``queue`` (G,) becomes the ranks of the closed set, which can hand
    load to no other, as many as are returned, ``reached`` (G,) 1 for them; ``give`` and ``take`` (G,) are scratch.
    """
    size, num_closed = expert.shape[0] // load.shape[0], number(0)
    for _ in range(20 * load.shape[0] + 4 * expert.shape[0]):
        hottest = hottest_rank(load, inverse_speed)
        coolest, total, capacity = hottest, 0.0, 0.0
        num_closed = reach(expert, following, replicas, tokens, size, hottest, reached, queue, give, take, least)
        for i in range(num_closed):
            rank = queue[i]
            total += load[rank]
            capacity += 1.0 / inverse_speed[rank]
            if load[rank] * inverse_speed[rank] < load[coolest] * inverse_speed[coolest]:
                coolest = rank
        mean, top = total / capacity, load[hottest] * inverse_speed[hottest]
        if top - mean <= tolerance * top or coolest == hottest:
            break
        flow = min((top - mean) / inverse_speed[hottest], mean / inverse_speed[coolest] - load[coolest])
        rank = coolest
        while rank != hottest:
            flow = min(flow, tokens[give[rank]])
            rank = give[rank] // size
        rank = coolest
        while rank != hottest:
            tokens[take[rank]] += flow
            tokens[give[rank]] -= flow
            rank = give[rank] // size
        load[hottest] -= flow
        load[coolest] += flow
    return num_closed


@helper
def reach(
    expert: np.ndarray,
    following: np.ndarray,
    replicas: np.ndarray,
    tokens: np.ndarray,
    size: int,
    start: int,
    reached: np.ndarray,
    queue: np.ndarray,
    give: np.ndarray,
    take: np.ndarray,
    least: float,
) -> int:
    """Fills ``queue`` with the ranks that tokens can flow to from ``start``, the nearest first; how many.

    ``reached`` (G,) becomes 1 for them, ``give`` and ``take`` (G,) the slots that the last step of the way is between.
    Slots with no more than ``least`` tokens hand on nothing.
    """
    for rank in range(reached.shape[0]):
        reached[rank] = 0
    reached[start] = 1
    queue[0] = start
    head, tail = 0, 1
    while head < tail:
        rank = queue[head]
        head += 1
        for slot in range(rank * size, (rank + 1) * size):
            if tokens[slot] <= least:
                continue
            other = replicas[expert[slot], FIRST]
            while other >= 0:
                target = other // size
                if reached[target] == 0:
                    reached[target] = 1
                    give[target], take[target] = slot, other
                    queue[tail] = target
                    tail += 1
                other = following[other]
    return tail
