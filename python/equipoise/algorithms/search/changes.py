"""Evaluates and applies the changes that a local search may make to a placement.

Two slots of different ranks swap their experts with the shares they have; or a redundant slot is overwritten with a
replica of another slot's expert, which takes over part of that one's share, while what lay there leaves its share to
one of its remaining replicas. Gains are differences of the cost of layer_state.py; first-order gains and bounds are
what dismisses a change before its gain is computed.
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
    LayerState,
    add_share,
    power,
    powers,
    refresh,
    relink,
)
from equipoise.algorithms.search.shares import best_transfer, marginal, optimise_shares_of
from equipoise.jit.compile import helper, inlined, number


@helper
def slot_loads(
    expert: np.ndarray, share: np.ndarray, experts: np.ndarray, rank: int, size: int, out: np.ndarray
) -> None:
    """Fills ``out`` (S, scenarios) with what each slot of a rank adds to its load."""
    for k in range(size):
        slot = rank * size + k
        part, e = share[slot], expert[slot]
        risk = experts[e, NOISE] * part * part
        for s in range(NUM_SCENARIOS):
            out[k, s] = part * experts[e, s] + risk


@helper
def first_order_gain(ranks: np.ndarray, loads: np.ndarray, k: int, source: int, target: int) -> float:
    """First-order gain (over q) of row ``k`` of ``loads`` going from one rank to another."""
    total = 0.0
    for s in range(NUM_SCENARIOS):
        total += (ranks[source, SLOPE + s] - ranks[target, SLOPE + s]) * loads[k, s]
    return total


@helper
def swap_gain(
    ranks: np.ndarray,
    weight: np.ndarray,
    loads_1: np.ndarray,
    k_1: int,
    rank_1: int,
    loads_2: np.ndarray,
    k_2: int,
    rank_2: int,
    doublings: int,
) -> float:
    gain = ranks[rank_1, COST] + ranks[rank_2, COST]
    slow_1, slow_2 = ranks[rank_1, INVERSE_SPEED], ranks[rank_2, INVERSE_SPEED]
    a, b = loads_1[k_1, 0] - loads_2[k_2, 0], loads_1[k_1, 1] - loads_2[k_2, 1]
    c, d = loads_1[k_1, 2] - loads_2[k_2, 2], loads_1[k_1, 3] - loads_2[k_2, 3]
    less = (
        ranks[rank_1, 0] - a * slow_1,
        ranks[rank_1, 1] - b * slow_1,
        ranks[rank_1, 2] - c * slow_1,
        ranks[rank_1, 3] - d * slow_1,
    )
    more = (
        ranks[rank_2, 0] + a * slow_2,
        ranks[rank_2, 1] + b * slow_2,
        ranks[rank_2, 2] + c * slow_2,
        ranks[rank_2, 3] + d * slow_2,
    )
    costs_1, costs_2 = powers(less, doublings), powers(more, doublings)
    for s in range(NUM_SCENARIOS):
        gain -= weight[s] * (costs_1[s] + costs_2[s])
    return gain


@helper
def exchange_bound(
    ranks: np.ndarray, weight: np.ndarray, rank_1: int, rank_2: int, loads_2: np.ndarray, k: int, doublings: int
) -> float:
    """Upper bound on the gain of any exchange between two ranks, when row ``k`` of ``loads_2`` (-1: none) leaves.

    The power mean is at least the mean, so two ranks can do no better than to become level::

        gain <= cost_1 + cost_2 - 2 sum_s w_s level_s ** q,    level_s = (tokens_1s + tokens_2s) / (speed_1 + speed_2)

    Exact for ranks of one speed and without a price of risk. Of two speeds the slower one may end a little above the
    level, and a share that is split carries less risk: then it is an estimate, off by less than what a step must gain.
    """
    gain = ranks[rank_1, COST] + ranks[rank_2, COST]
    slow_1, slow_2 = ranks[rank_1, INVERSE_SPEED], ranks[rank_2, INVERSE_SPEED]
    leaves, both = (slow_1 * slow_2 if k >= 0 else 0.0), slow_1 + slow_2
    k = max(k, 0)
    levels = (
        (ranks[rank_1, 0] * slow_2 + ranks[rank_2, 0] * slow_1 - loads_2[k, 0] * leaves) / both,
        (ranks[rank_1, 1] * slow_2 + ranks[rank_2, 1] * slow_1 - loads_2[k, 1] * leaves) / both,
        (ranks[rank_1, 2] * slow_2 + ranks[rank_2, 2] * slow_1 - loads_2[k, 2] * leaves) / both,
        (ranks[rank_1, 3] * slow_2 + ranks[rank_2, 3] * slow_1 - loads_2[k, 3] * leaves) / both,
    )
    costs = powers(levels, doublings)
    for s in range(NUM_SCENARIOS):
        gain -= 2.0 * weight[s] * costs[s]
    return gain


@inlined
def cheapest_remaining(state: LayerState, slot: int, size: int) -> tuple[int, float]:
    """The remaining replica that takes an overwritten slot's share most cheaply; first-order cost (over q)."""
    expert, following, share, replicas, _, ranks, experts, _ = state
    e, part = expert[slot], share[slot]
    best, least = number(-1), np.inf
    other = replicas[e, FIRST]
    while other >= 0:
        if other != slot:
            price = part * marginal(ranks, experts, other // size, e, share[other] + 0.5 * part)
            if price < least:
                best, least = other, price
        other = following[other]
    return best, least


@inlined
def overwrite_gain(
    state: LayerState, hot_slot: int, slot: int, remaining: int, doublings: int, saved: np.ndarray
) -> tuple[float, float]:
    """Gain of giving ``slot`` a replica of ``hot_slot``'s expert, and the share that it best takes over."""
    expert, _, share, _, _, ranks, experts, weight = state
    size = expert.shape[0] // ranks.shape[0]
    hot, rank, third = hot_slot // size, slot // size, remaining // size
    e, has, freed, remaining_share = expert[hot_slot], share[hot_slot], share[slot], share[remaining]
    apart = third != hot and third != rank
    gain = ranks[hot, COST] + ranks[rank, COST]
    if apart:
        gain += ranks[third, COST]
    for s in range(NUM_SCENARIOS):
        saved[0, s], saved[1, s] = ranks[rank, s], ranks[third, s]
    add_share(expert, share, ranks, experts, slot, -freed)
    add_share(expert, share, ranks, experts, remaining, freed)
    t = best_transfer(ranks, experts, weight, e, hot, rank, has, 0.0, doublings, number(2))
    for s in range(NUM_SCENARIOS):
        less = t * (experts[e, s] + experts[e, NOISE] * (2.0 * has - t)) * ranks[hot, INVERSE_SPEED]
        more = t * (experts[e, s] + experts[e, NOISE] * t) * ranks[rank, INVERSE_SPEED]
        gain -= weight[s] * (power(ranks[hot, s] - less, doublings) + power(ranks[rank, s] + more, doublings))
        if apart:
            gain -= weight[s] * power(ranks[third, s], doublings)
    share[slot], share[remaining] = freed, remaining_share
    for s in range(NUM_SCENARIOS):
        ranks[third, s] = saved[1, s]
        ranks[rank, s] = saved[0, s]
    return gain, t


@helper
def overwrite(state: LayerState, slot: int, remaining: int, new: int) -> None:
    """Gives ``slot`` to the expert ``new``, with no share yet; its old share goes to the slot ``remaining``."""
    expert, following, share, replicas, held, ranks, experts, _ = state
    freed = share[slot]
    add_share(expert, share, ranks, experts, slot, -freed)
    add_share(expert, share, ranks, experts, remaining, freed)
    relink(expert, following, replicas, held, slot, new)
    share[slot] = 0.0


@helper
def swap(state: LayerState, slot_1: int, slot_2: int) -> None:
    """Exchanges the experts of two slots, with their shares; ``refresh`` both ranks afterwards."""
    expert, following, share, replicas, held, ranks, experts, _ = state
    e_1, e_2, share_1, share_2 = expert[slot_1], expert[slot_2], share[slot_1], share[slot_2]
    add_share(expert, share, ranks, experts, slot_1, -share_1)
    add_share(expert, share, ranks, experts, slot_2, -share_2)
    relink(expert, following, replicas, held, slot_1, e_2)
    relink(expert, following, replicas, held, slot_2, e_1)
    add_share(expert, share, ranks, experts, slot_1, share_2)
    add_share(expert, share, ranks, experts, slot_2, share_1)


@inlined
def apply_change(state: LayerState, slot_1: int, slot_2: int, remaining: int, t: float, doublings: int) -> None:
    """Applies an overwrite (``remaining`` names a slot) or a swap (-1), and optimises the shares around it."""
    expert, _, share, replicas, _, ranks, experts, weight = state
    size = expert.shape[0] // ranks.shape[0]
    if remaining >= 0:
        overwrite(state, slot_2, remaining, expert[slot_1])
        add_share(expert, share, ranks, experts, slot_1, -t)
        add_share(expert, share, ranks, experts, slot_2, t)
    else:
        swap(state, slot_1, slot_2)
    for i in range(3 if remaining >= 0 else 2):
        slot = slot_1 if i == 0 else slot_2 if i == 1 else remaining
        refresh(ranks, weight, slot // size, doublings)
    for i in range(3 if remaining >= 0 else 2):
        slot = slot_1 if i == 0 else slot_2 if i == 1 else remaining
        first = slot // size * size
        for near in range(first, first + size):
            if replicas[expert[near], COUNT] > 1:
                optimise_shares_of(state, expert[near], doublings, 1e-3)
