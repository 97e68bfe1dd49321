"""Optimises the shares of replicas by coordinate descent on the cost of layer_state.py.

At the optimum one more unit of an expert's share costs the same on each of its replicas that has any. So share goes
from the dearest replica to the cheapest until they agree, expert after expert; the cost is convex, and it only falls.
"""

from __future__ import annotations

import numpy as np

from equipoise.algorithms.forecast.scenarios import NUM_SCENARIOS
from equipoise.algorithms.search.layer_state import (
    COST,
    COUNT,
    FIRST,
    INVERSE_SPEED,
    NOISE,
    SLOPE,
    TINY,
    LayerState,
    add_share,
    changed_loads,
    powers,
    refresh,
)
from equipoise.jit.compile import helper, number


@helper
def marginal(ranks: np.ndarray, experts: np.ndarray, rank: int, e: int, share: float) -> float:
    """Cost (over q) of one more unit of expert ``e``'s share on a rank that has ``share`` of it."""
    risk = 2.0 * experts[e, NOISE] * share
    total = 0.0
    for s in range(NUM_SCENARIOS):
        total += ranks[rank, SLOPE + s] * (experts[e, s] + risk)
    return total


@helper
def best_transfer(
    ranks: np.ndarray,
    experts: np.ndarray,
    weight: np.ndarray,
    e: int,
    source: int,
    target: int,
    has: float,
    gets: float,
    doublings: int,
    max_rounds: int,
) -> float:
    """The part of expert ``e``'s share that best goes from a rank that has ``has`` of it to one that has ``gets``.

    Newton's method on a convex function of one number.
    """
    q = float(1 << doublings)
    slow_1, slow_2 = ranks[source, INVERSE_SPEED], ranks[target, INVERSE_SPEED]
    noise = experts[e, NOISE]
    low, high, t = 0.0, has, 0.0
    for _ in range(max_rounds):
        slope, curve = 0.0, 0.0
        gone, come = noise * t * (2.0 * has - t), noise * t * (2.0 * gets + t)
        loads_1 = changed_loads(ranks, source, experts, e, -t, -gone)
        loads_2 = changed_loads(ranks, target, experts, e, t, come)
        costs_1, costs_2 = powers(loads_1, doublings), powers(loads_2, doublings)
        for s in range(NUM_SCENARIOS):
            tokens = experts[e, s]
            rate_1 = (tokens + 2.0 * noise * (has - t)) * slow_1
            rate_2 = (tokens + 2.0 * noise * (gets + t)) * slow_2
            over_1, over_2 = 1.0 / loads_1[s], 1.0 / loads_2[s]
            part_1 = weight[s] * costs_1[s] * over_1
            part_2 = weight[s] * costs_2[s] * over_2
            slope += rate_2 * part_2 - rate_1 * part_1
            curve += (q - 1.0) * (rate_1 * rate_1 * part_1 * over_1 + rate_2 * rate_2 * part_2 * over_2)
            curve += 2.0 * noise * (part_1 * slow_1 + part_2 * slow_2)
        if curve <= 0.0:
            break
        if slope < 0.0:
            low = t
        else:
            high = t
        before = t
        t = min(max(t - slope / curve, low), high)
        if abs(before - t) <= 1e-3 * has:
            break
    return t


@helper
def optimise_shares_of(state: LayerState, e: int, doublings: int, tolerance: float) -> float:
    """Moves share between the dearest and the cheapest replica of expert ``e`` until they agree; the gain."""
    expert, following, share, replicas, _, ranks, experts, weight = state
    size = expert.shape[0] // ranks.shape[0]
    gain = 0.0
    for _ in range(replicas[e, COUNT] - 1):
        dear, cheap, most, least = number(-1), number(-1), -1.0, np.inf
        slot = replicas[e, FIRST]
        while slot >= 0:
            price = marginal(ranks, experts, slot // size, e, share[slot])
            if share[slot] > 0.0 and price > most:
                dear, most = slot, price
            if price < least:
                cheap, least = slot, price
            slot = following[slot]
        source, target = dear // size, cheap // size
        if dear < 0 or source == target or most - least <= tolerance * most:
            break
        has = share[dear]
        t = best_transfer(ranks, experts, weight, e, source, target, has, share[cheap], doublings, number(6))
        if t <= 0.0:
            break
        if has - t < TINY:
            t = has
        before = ranks[source, COST] + ranks[target, COST]
        add_share(expert, share, ranks, experts, dear, -t)
        add_share(expert, share, ranks, experts, cheap, t)
        refresh(ranks, weight, source, doublings)
        refresh(ranks, weight, target, doublings)
        gain += before - ranks[source, COST] - ranks[target, COST]
    return gain


@helper
def optimise_shares(state: LayerState, doublings: int, rounds: int, tolerance: float) -> None:
    """Re-solves all shares: round after round over the replicated experts until a round gains next to nothing."""
    replicas, ranks, weight = state.replicas, state.ranks, state.weight
    for rank in range(ranks.shape[0]):
        refresh(ranks, weight, rank, doublings)
    for _ in range(rounds):
        gain, total = 0.0, 0.0
        for e in range(replicas.shape[0]):
            if replicas[e, COUNT] > 1:
                gain += optimise_shares_of(state, e, doublings, tolerance)
        for rank in range(ranks.shape[0]):
            total += ranks[rank, COST]
        if gain <= tolerance * total:
            break
