"""Splits a batch's tokens over the replicas of a placement so that the largest rank load is least.

A flow, as in min_max.py, but of tokens, and kept from one placement to the next: a search tries hundreds of placements
that differ by one slot, and the flow of each is a few steps away from that of the one before it.
"""

from __future__ import annotations

import numpy as np

from equipoise.algorithms.search.layer_state import COUNT, FIRST
from equipoise.jit.compile import helper, number

LEVEL = 5e-4  # relative: how far above the least maximum a split may end
LEAST = 1e-6  # of a mean rank's load: fewer tokens than that do not flow


@helper
def spread_tokens(
    following: np.ndarray, replicas: np.ndarray, experts: np.ndarray, tokens: np.ndarray, load: np.ndarray
) -> None:
    """Splits the tokens ``experts`` (E,) alike over live replicas: fills ``tokens`` (P,) and ``load`` (G,)."""
    size = tokens.shape[0] // load.shape[0]
    for rank in range(load.shape[0]):
        load[rank] = 0.0
    for slot in range(tokens.shape[0]):
        tokens[slot] = 0.0
    for e in range(experts.shape[0]):
        slot = replicas[e, FIRST]
        while slot >= 0:
            tokens[slot] = experts[e] / replicas[e, COUNT]
            load[slot // size] += tokens[slot]
            slot = following[slot]


@helper
def hottest_rank(load: np.ndarray, inverse_speed: np.ndarray) -> int:
    """The rank that ends last."""
    hottest = number(0)
    for rank in range(load.shape[0]):
        if load[rank] * inverse_speed[rank] > load[hottest] * inverse_speed[hottest]:
            hottest = rank
    return hottest


@helper
def coolest_replica(
    following: np.ndarray, replicas: np.ndarray, load: np.ndarray, inverse_speed: np.ndarray, size: int, e: int
) -> int:
    """The slot of an expert whose rank ends first."""
    coolest = replicas[e, FIRST]
    other = following[coolest]
    while other >= 0:
        rank, best = other // size, coolest // size
        if load[rank] * inverse_speed[rank] < load[best] * inverse_speed[best]:
            coolest = other
        other = following[other]
    return coolest


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
) -> None:
    """Lowers the largest of ``load`` (G,) times ``inverse_speed`` to its least value, in place, as ``tokens`` (P,).

    ``reached`` (G,) becomes 1 for the ranks of the closed set, which can hand load to no other. The last three (G,) are
    scratch.
    """
    size = expert.shape[0] // load.shape[0]
    for _ in range(4 * load.shape[0] + expert.shape[0]):
        hottest = hottest_rank(load, inverse_speed)
        coolest, total, capacity = hottest, 0.0, 0.0
        for i in range(reach(expert, following, replicas, tokens, size, hottest, reached, queue, give, take)):
            rank = queue[i]
            total += load[rank]
            capacity += 1.0 / inverse_speed[rank]
            if load[rank] * inverse_speed[rank] < load[coolest] * inverse_speed[coolest]:
                coolest = rank
        mean, top = total / capacity, load[hottest] * inverse_speed[hottest]
        if top - mean <= LEVEL * top or coolest == hottest:
            return
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
) -> int:
    """Fills ``queue`` with the ranks that tokens can flow to from ``start``, the nearest first; how many."""
    for rank in range(reached.shape[0]):
        reached[rank] = 0
    reached[start] = 1
    queue[0] = start
    head, tail = 0, 1
    while head < tail:
        rank = queue[head]
        head += 1
        for slot in range(rank * size, (rank + 1) * size):
            if tokens[slot] <= LEAST:
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
