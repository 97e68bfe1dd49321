"""Local search from the placement in force: the fewest priced changes that balance the load to come.

Each step looks at the slots of the hottest ranks against those of the coolest ones and applies the change that lowers
the soft maximum (see layer_state.py) most per price: two slots swap their experts, or a redundant slot is overwritten
with a replica of a hot rank's expert, whose best share is solved along with it. The cost is convex, so a first-order
estimate bounds what a change can gain, and most are dismissed by it. After each change the shares of the replicated
experts around it settle anew. A change that undoes a move gives its price back.

The search walks on past the point where moves pay, and the best of all placements on its way wins: the one with the
largest expected balance minus price. So each prefix is tried as a budget.
"""

from __future__ import annotations

import numba
import numpy as np

from equipoise.algorithms.layer_state import (
    LayerState,
    add_share,
    best_transfer,
    expected_balance,
    fill_lists,
    link,
    marginal,
    power,
    refresh,
    settle,
    settle_all,
    unlink,
    whole,
)
from equipoise.algorithms.scenarios import NUM_SCENARIOS

NUM_HOT = 4  # ranks whose load a step tries to lower
NUM_COOL = 16  # ranks it tries to put it on
PATIENCE = 12  # steps without a new best before a stage ends
ON_RANK, ON_NODE, ELSEWHERE = 0, 1, 2  # where an expert was before the search
_FREE = 0.05  # price that a change without a move is ranked by
_LEAST_GAIN = 1e-4  # of the cost, that a step has to bring


@numba.njit(cache=True, nogil=True)
def origin(expert: np.ndarray, num_experts: int, num_ranks: int, ranks_per_node: int) -> np.ndarray:
    """(G, E) uint8: whether each rank holds an expert already, or at least its node does."""
    slots_per_rank = expert.shape[0] // num_ranks
    where = np.full((num_ranks, num_experts), ELSEWHERE, dtype=np.uint8)
    for slot in range(expert.shape[0]):
        node = slot // slots_per_rank // ranks_per_node
        for rank in range(node * ranks_per_node, (node + 1) * ranks_per_node):
            where[rank, expert[slot]] = min(where[rank, expert[slot]], ON_NODE)
    for slot in range(expert.shape[0]):
        where[slot // slots_per_rank, expert[slot]] = ON_RANK
    return where


@numba.njit(cache=True, nogil=True)
def spent(state: LayerState, where: np.ndarray, prices: np.ndarray) -> tuple[float, int]:
    """Price and number of the moves that lead to the present placement."""
    total, moves = 0.0, 0
    for slot in range(state.expert.shape[0]):
        place = where[slot // state.slots_per_rank, state.expert[slot]]
        total += prices[place]
        moves += place != ON_RANK
    return total, moves


@numba.njit(cache=True, nogil=True)
def _pick_ranks(
    state: LayerState, first: int, last: int, hot: np.ndarray, cool: np.ndarray
) -> tuple[int, int]:
    """Fills ``hot`` and ``cool`` with ranks of first..last-1 by descending and ascending cost; returns how many."""
    num_hot, num_cool = 0, 0
    for rank in range(first, last):
        if state.slowness[rank] == 0.0:
            continue
        cost = state.cost[rank]
        if num_hot < hot.shape[0] or cost > state.cost[hot[num_hot - 1]]:
            num_hot = min(num_hot + 1, hot.shape[0])
            i = num_hot - 1
            while i > 0 and state.cost[hot[i - 1]] < cost:
                hot[i] = hot[i - 1]
                i -= 1
            hot[i] = rank
        if num_cool < cool.shape[0] or cost < state.cost[cool[num_cool - 1]]:
            num_cool = min(num_cool + 1, cool.shape[0])
            i = num_cool - 1
            while i > 0 and state.cost[cool[i - 1]] > cost:
                cool[i] = cool[i - 1]
                i -= 1
            cool[i] = rank
    return num_hot, num_cool


@numba.njit(cache=True, nogil=True)
def heir_of(state: LayerState, slot: int) -> tuple[int, float]:
    """The replica that takes a slot's share most cheaply when the slot gives up its expert, and the first-order cost."""
    expert, share = state.expert[slot], state.share[slot]
    best, least = -1, np.inf
    other = state.first_slot[expert]
    while other >= 0:
        if other != slot:
            price = share * marginal(state, other // state.slots_per_rank, expert, state.share[other] + 0.5 * share)
            if price < least:
                best, least = other, price
        other = state.next_slot[other]
    return best, least


@numba.njit(cache=True, nogil=True)
def _swapped_cost(state: LayerState, slot_1: int, slot_2: int, doublings: int) -> float:
    """Cost of the two ranks once the slots have swapped experts and shares."""
    rank_1, rank_2 = slot_1 // state.slots_per_rank, slot_2 // state.slots_per_rank
    expert_1, expert_2 = state.expert[slot_1], state.expert[slot_2]
    share_1, share_2 = state.share[slot_1], state.share[slot_2]
    risk = state.noise[expert_1] * share_1 * share_1 - state.noise[expert_2] * share_2 * share_2
    total = 0.0
    for s in range(NUM_SCENARIOS):
        moved = share_1 * state.tokens[expert_1, s] - share_2 * state.tokens[expert_2, s] + risk
        total += state.weight[s] * (
            power(state.load[rank_1, s] - moved * state.slowness[rank_1], doublings)
            + power(state.load[rank_2, s] + moved * state.slowness[rank_2], doublings)
        )
    return total


@numba.njit(cache=True, nogil=True)
def _overwritten_cost(
    state: LayerState, hot_slot: int, slot: int, heir: int, doublings: int, saved: np.ndarray
) -> tuple[float, float]:
    """Gain of giving ``slot`` a replica of ``hot_slot``'s expert, and the share that it best takes over."""
    size = state.slots_per_rank
    hot, rank, third = hot_slot // size, slot // size, heir // size
    expert, has, freed = state.expert[hot_slot], state.share[hot_slot], state.share[slot]
    heir_share = state.share[heir]
    saved[0], saved[1] = state.load[rank], state.load[third]
    add_share(state, slot, -freed)
    add_share(state, heir, freed)
    t = best_transfer(state, expert, hot, rank, has, 0.0, doublings)
    noise = state.noise[expert]
    gain = state.cost[hot] + state.cost[rank]
    apart = third != hot and third != rank
    if apart:
        gain += state.cost[third]
    for s in range(NUM_SCENARIOS):
        tokens = state.tokens[expert, s]
        less = t * (tokens + noise * (2.0 * has - t)) * state.slowness[hot]
        more = t * (tokens + noise * t) * state.slowness[rank]
        gain -= state.weight[s] * (
            power(state.load[hot, s] - less, doublings) + power(state.load[rank, s] + more, doublings)
        )
        if apart:
            gain -= state.weight[s] * power(state.load[third, s], doublings)
    state.share[slot], state.share[heir] = freed, heir_share
    state.load[third] = saved[1]
    state.load[rank] = saved[0]
    return gain, t


@numba.njit(cache=True, nogil=True)
def overwrite(state: LayerState, slot: int, heir: int, expert: int) -> None:
    """Gives ``slot`` to ``expert``; the share of the one that was there goes to its replica in ``heir``."""
    freed = state.share[slot]
    add_share(state, slot, -freed)
    add_share(state, heir, freed)
    unlink(state, slot)
    link(state, slot, expert)
    state.share[slot] = 0.0


@numba.njit(cache=True, nogil=True)
def _swap(state: LayerState, slot_1: int, slot_2: int) -> None:
    expert_1, expert_2 = state.expert[slot_1], state.expert[slot_2]
    share_1, share_2 = state.share[slot_1], state.share[slot_2]
    add_share(state, slot_1, -share_1)
    add_share(state, slot_2, -share_2)
    unlink(state, slot_1)
    unlink(state, slot_2)
    link(state, slot_1, expert_2)
    link(state, slot_2, expert_1)
    add_share(state, slot_1, share_2)
    add_share(state, slot_2, share_1)


@numba.njit(cache=True, nogil=True)
def _settle_rank(state: LayerState, rank: int, doublings: int) -> None:
    for slot in range(rank * state.slots_per_rank, (rank + 1) * state.slots_per_rank):
        if state.num_replicas[state.expert[slot]] > 1:
            settle(state, state.expert[slot], doublings, 1e-3)


@numba.njit(cache=True, nogil=True)
def _step(
    state: LayerState,
    first: int,
    last: int,
    where: np.ndarray,
    prices: np.ndarray,
    room: int,
    doublings: int,
    least_gain: float,
) -> bool:
    """Applies the best change among ranks first..last-1; False if none gains ``least_gain`` per price."""
    size = state.slots_per_rank
    q = float(1 << doublings)
    hot, cool = np.empty(NUM_HOT, dtype=np.int64), np.empty(NUM_COOL, dtype=np.int64)
    num_hot, num_cool = _pick_ranks(state, first, last, hot, cool)
    heir, freed = np.empty(size, dtype=np.int64), np.empty(size)
    back, saved = np.empty(size), np.empty((2, NUM_SCENARIOS))
    best, slot_1, slot_2, best_heir, best_t = least_gain, -1, -1, -1, 0.0
    for j in range(num_cool):
        rank_2 = cool[j]
        most_freed = -np.inf
        for k in range(size):
            slot = rank_2 * size + k
            expert = state.expert[slot]
            heir[k] = -1
            if state.num_replicas[expert] > 1:
                heir[k], cost = heir_of(state, slot)
                freed[k] = whole(state, rank_2, expert, state.share[slot]) - cost
                most_freed = max(most_freed, freed[k])
        for i in range(num_hot):
            rank_1 = hot[i]
            if rank_1 == rank_2 or state.cost[rank_1] <= state.cost[rank_2]:
                continue
            most_back = -np.inf
            for k in range(size):
                slot = rank_2 * size + k
                expert, share = state.expert[slot], state.share[slot]
                back[k] = whole(state, rank_2, expert, share) - whole(state, rank_1, expert, share)
                most_back = max(most_back, back[k])
            for p in range(rank_1 * size, (rank_1 + 1) * size):
                expert, share = state.expert[p], state.share[p]
                if share <= 0.0 or state.held[rank_2, expert] > 0:
                    continue
                out = whole(state, rank_1, expert, share) - whole(state, rank_2, expert, share)
                rate = marginal(state, rank_1, expert, share) - marginal(state, rank_2, expert, 0.0)
                if q * max(out + most_back, share * rate + most_freed) <= best * _FREE:
                    continue
                place = where[rank_2, expert]
                for k in range(size):
                    slot = rank_2 * size + k
                    other = state.expert[slot]
                    was = where[rank_2, other]
                    price = prices[place] - prices[was]
                    more = (place != ON_RANK) - (was != ON_RANK)
                    if heir[k] >= 0 and rate > 0.0 and more <= room:
                        pay = max(price, _FREE)
                        if q * (share * rate + freed[k]) > best * pay:
                            gain, t = _overwritten_cost(state, p, slot, heir[k], doublings, saved)
                            if gain > best * pay and t > 0.0:
                                best, slot_1, slot_2, best_heir, best_t = gain / pay, p, slot, heir[k], t
                    if state.held[rank_1, other] == 0:
                        price += prices[where[rank_1, other]] - prices[where[rank_1, expert]]
                        more += (where[rank_1, other] != ON_RANK) - (where[rank_1, expert] != ON_RANK)
                        pay = max(price, _FREE)
                        if more <= room and q * (out + back[k]) > best * pay:
                            gain = state.cost[rank_1] + state.cost[rank_2] - _swapped_cost(state, p, slot, doublings)
                            if gain > best * pay:
                                best, slot_1, slot_2, best_heir = gain / pay, p, slot, -1
    if slot_1 < 0:
        return False
    third = -1
    if best_heir >= 0:
        overwrite(state, slot_2, best_heir, state.expert[slot_1])
        add_share(state, slot_1, -best_t)
        add_share(state, slot_2, best_t)
        third = best_heir // size
        refresh(state, third, doublings)
    else:
        _swap(state, slot_1, slot_2)
    refresh(state, slot_1 // size, doublings)
    refresh(state, slot_2 // size, doublings)
    _settle_rank(state, slot_1 // size, doublings)
    _settle_rank(state, slot_2 // size, doublings)
    if third >= 0:
        _settle_rank(state, third, doublings)
    return True


@numba.njit(cache=True, nogil=True)
def search(
    state: LayerState,
    where: np.ndarray,
    prices: np.ndarray,
    slot_price: float,
    ranks_per_domain: int,
    max_moves: int,
    stages: np.ndarray,
    max_steps: int,
) -> float:
    """Searches from the state's placement and leaves the best one found in it.

    Args:
        where: (G, E) from :func:`origin`.
        prices: (3,) price of a move by where the expert was: ON_RANK, ON_NODE, ELSEWHERE.
        slot_price: balance that a move of price 1 has to gain.
        ranks_per_domain: experts stay within such a block of ranks: all of them, or a node.
        max_moves: hard limit on moves.
        stages: exponents of the soft maximum, one after the other, as doublings (3 is q = 8).
        max_steps: most changes tried.

    Returns:
        Expected balance minus the price of the moves.
    """
    num_ranks = state.cost.shape[0]
    num_domains = num_ranks // ranks_per_domain
    price, moves = spent(state, where, prices)
    for stage in range(stages.shape[0]):
        settle_all(state, stages[stage], 3, 1e-3)
    value = expected_balance(state) - slot_price * price
    best_expert, best_share = state.expert.copy(), state.share.copy()
    heat = np.empty(num_domains)
    steps = 0
    for stage in range(stages.shape[0]):
        doublings = stages[stage]
        settle_all(state, doublings, 2, 1e-3)
        idle = 0
        while steps < max_steps and idle < PATIENCE:
            if 1.0 - slot_price * price <= value:
                break  # no balance could pay for the moves made so far
            steps += 1
            total = 0.0
            for domain in range(num_domains):
                heat[domain] = 0.0
                for rank in range(domain * ranks_per_domain, (domain + 1) * ranks_per_domain):
                    heat[domain] = max(heat[domain], state.cost[rank])
                    total += state.cost[rank]
            changed = False
            for _ in range(num_domains):
                domain = np.argmax(heat)
                heat[domain] = -1.0
                first = domain * ranks_per_domain
                least = _LEAST_GAIN * total
                changed = _step(
                    state, first, first + ranks_per_domain, where, prices, max_moves - moves, doublings, least
                )
                if changed:
                    break
            if not changed:
                break
            price, moves = spent(state, where, prices)
            now = expected_balance(state) - slot_price * price
            idle += 1
            if now > value:
                value, idle = now, 0
                best_expert[:] = state.expert
                best_share[:] = state.share
    state.expert[:] = best_expert
    state.share[:] = best_share
    fill_lists(state)
    settle_all(state, stages[-1], 6, 1e-4)
    return expected_balance(state) - slot_price * spent(state, where, prices)[0]
