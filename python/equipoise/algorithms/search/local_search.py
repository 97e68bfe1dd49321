"""Local search from the placement in force: the fewest priced changes that balance the load to come.

Each step looks at the slots of the hottest ranks against those of the coolest ones and applies the change that lowers
the soft maximum (see layer_state.py) most per price: two slots swap their experts, or a redundant slot is overwritten
with a replica of a hot rank's expert, whose best share is solved along with it. The cost is convex, so a first-order
estimate bounds what a change can gain, and most are dismissed by it. After each change the shares of the replicated
experts around it settle anew. A change that undoes a move gives its price back.

The search walks on a little past the point where moves pay, and the best placement on its way wins: the one with the
largest expected balance minus price. So each prefix of the walk is a budget that was tried.
"""

from __future__ import annotations

import numpy as np

from equipoise.algorithms.forecast.scenarios import NUM_SCENARIOS
from equipoise.algorithms.search.changes import (
    apply_change,
    find_heir,
    first_order_gain,
    most_gain,
    overwrite_gain,
    slot_loads,
    swap_gain,
)
from equipoise.algorithms.search.layer_state import (
    COST,
    COUNT,
    SLOPE,
    SLOWNESS,
    LayerState,
    copy_placement,
    expected_balance,
    fill,
)
from equipoise.algorithms.search.move_price import ON_RANK, spent
from equipoise.algorithms.search.shares import marginal, settle_all
from equipoise.jit.compile import helper, inlined, int_zeros, number, zeros

NUM_HOT = 3  # ranks whose load a step tries to lower
NUM_COOL = 6  # ranks it tries to put it on, at first; then twice as many, as long as they offer nothing
PATIENCE = 8  # steps without a new best before a stage ends; one for every four ranks where those are more
_FREE = 0.05  # price that a change without a move is ranked by
WORTH = 0.3  # of what a change must gain to pay: below, it is not even walked through
MANY_RANKS = 32  # beyond, one step is a smaller part of the whole, and may gain as much less


@helper
def _pick_ranks(ranks: np.ndarray, first: int, last: int, picked: np.ndarray, most: int, sign: float) -> int:
    """Fills ``picked`` with the ``most`` live ranks of first..last-1 by descending ``sign * cost``; how many."""
    count = 0
    for rank in range(first, last):
        key = sign * ranks[rank, COST]
        if ranks[rank, SLOWNESS] == 0.0 or (count == most and key <= sign * ranks[picked[count - 1], COST]):
            continue
        count = min(count + 1, most)
        i = count - 1
        while i > 0 and sign * ranks[picked[i - 1], COST] < key:
            picked[i] = picked[i - 1]
            i -= 1
        picked[i] = rank
    return count


@helper
def _step(
    state: LayerState,
    first: int,
    last: int,
    where: np.ndarray,
    prices: np.ndarray,
    room: int,
    doublings: int,
    least_gain: float,
    num_tried: int,
    num_cool: int,
    scratch: np.ndarray,
) -> bool:
    """Applies the best change among ranks first..last-1; False if none gains ``least_gain`` per price.

    Of the ``num_cool`` coolest ranks, which may take load, the first ``num_tried`` are known to offer nothing.
    """
    expert, _, share, replicas, held, ranks, experts, weight = state
    size = expert.shape[0] // ranks.shape[0]
    q = float(1 << doublings)
    hot, cool = int_zeros(number(NUM_HOT)), int_zeros(num_cool)
    num_hot = _pick_ranks(ranks, first, last, hot, hot.shape[0], 1.0)
    num_cool = _pick_ranks(ranks, first, last, cool, cool.shape[0], -1.0)
    loads_2, saved = scratch[NUM_HOT], scratch[NUM_HOT + 1]
    for i in range(num_hot):
        slot_loads(expert, share, experts, hot[i], size, scratch[i])
    heirs, freed, hopes, back = int_zeros(size), zeros(size), zeros(size), zeros(size)
    best, slot_1, slot_2, best_heir, best_t = least_gain, number(-1), number(-1), number(-1), 0.0
    for j in range(num_tried, num_cool):
        rank_2 = cool[j]
        slot_loads(expert, share, experts, rank_2, size, loads_2)
        most_freed = -np.inf
        for k in range(size):
            slot = rank_2 * size + k
            heirs[k] = -1
            if replicas[expert[slot], COUNT] > 1:
                heirs[k], cost = find_heir(state, slot, size)
                freed[k] = -cost
                for s in range(NUM_SCENARIOS):
                    freed[k] += ranks[rank_2, SLOPE + s] * loads_2[k, s]
                most_freed = max(most_freed, freed[k])
        for i in range(num_hot):
            rank_1 = hot[i]
            if rank_1 == rank_2 or ranks[rank_1, COST] <= ranks[rank_2, COST]:
                continue
            most_back = -np.inf
            for k in range(size):
                back[k] = first_order_gain(ranks, loads_2, k, rank_2, rank_1)
                most_back = max(most_back, back[k])
            hope = most_gain(ranks, weight, rank_1, rank_2, loads_2, number(-1), doublings)
            for k in range(size):
                if heirs[k] >= 0:
                    hopes[k] = most_gain(ranks, weight, rank_1, rank_2, loads_2, k, doublings)
            for k_1 in range(size):
                p = rank_1 * size + k_1
                e, part = expert[p], share[p]
                if part <= 0.0 or held[rank_2, e] > 0:
                    continue
                out = first_order_gain(ranks, scratch[i], k_1, rank_1, rank_2)
                rate = part * (marginal(ranks, experts, rank_1, e, part) - marginal(ranks, experts, rank_2, e, 0.0))
                if q * max(out + most_back, rate + most_freed) <= best * _FREE:
                    continue
                place, here = where[rank_2, e], where[rank_1, e]
                for k in range(size):
                    slot = rank_2 * size + k
                    other = expert[slot]
                    was = where[rank_2, other]
                    price = prices[place] - prices[was]
                    more = (place != ON_RANK) - (was != ON_RANK)
                    if heirs[k] >= 0 and rate > 0.0 and more <= room:
                        pay = max(price, _FREE)
                        if min(q * (rate + freed[k]), hopes[k]) > best * pay:
                            gain, t = overwrite_gain(state, p, slot, heirs[k], doublings, saved)
                            if gain > best * pay and t > 0.0:
                                best, slot_1, slot_2, best_heir, best_t = gain / pay, p, slot, heirs[k], t
                    if min(q * (out + back[k]), hope) > best * _FREE and held[rank_1, other] == 0:
                        there = where[rank_1, other]
                        pay = max(price + prices[there] - prices[here], _FREE)
                        more += (there != ON_RANK) - (here != ON_RANK)
                        if more <= room and min(q * (out + back[k]), hope) > best * pay:
                            gain = swap_gain(ranks, weight, scratch[i], k_1, rank_1, loads_2, k, rank_2, doublings)
                            if gain > best * pay:
                                best, slot_1, slot_2, best_heir = gain / pay, p, slot, number(-1)
    if slot_1 >= 0:
        apply_change(state, slot_1, slot_2, best_heir, best_t, doublings)
    return slot_1 >= 0


@inlined
def search(
    state: LayerState,
    where: np.ndarray,
    prices: np.ndarray,
    slot_price: float,
    ranks_per_domain: int,
    max_moves: int,
    stages: np.ndarray,
    max_steps: int,
    least_gain: float,
    most_cool: int,
) -> float:
    """Searches from the state's placement and leaves the best one found in it.

    Args:
        where: (G, E) from :func:`~equipoise.algorithms.search.move_price.origin`.
        prices: (3,) price of a move by where the expert was: ON_RANK, ON_NODE, ELSEWHERE.
        slot_price: balance that a move of price 1 has to gain.
        ranks_per_domain: experts stay within such a block of ranks: all of them, or a node.
        max_moves: hard limit on moves.
        stages: exponents of the soft maximum, one after the other, as doublings (3 is q = 8).
        max_steps: most changes tried.
        least_gain: part of the cost that a step must gain, even for free; for many ranks less, as it is of any step.
        most_cool: ranks to put load on that a step looks at when the :data:`NUM_COOL` coolest offer nothing, at least
            as many.

    Returns:
        Expected balance minus the price of the moves.
    """
    expert, share, ranks, weight = state.expert, state.share, state.ranks, state.weight
    num_ranks = ranks.shape[0]
    num_domains = num_ranks // ranks_per_domain
    size = expert.shape[0] // num_ranks
    scratch = np.empty((NUM_HOT + 2, max(size, 2), NUM_SCENARIOS))
    heat = zeros(num_domains)
    best_expert, best_share = int_zeros(expert.shape[0]), zeros(share.shape[0])
    price, moves = spent(expert, where, prices)
    value, steps = -np.inf, 0
    for stage in range(stages.shape[0]):
        doublings = stages[stage]
        settle_all(state, doublings, number(3), 1e-3)
        idle, changed = 0, True
        while True:
            now = expected_balance(ranks, weight) - slot_price * price
            idle += 1
            if now > value:
                value, idle = now, 0
                copy_placement(expert, share, best_expert, best_share)
            if not changed or idle > max(PATIENCE, num_ranks // 4) or steps >= max_steps:
                break
            if 1.0 - slot_price * price <= value:
                break  # no balance could pay for the moves made so far
            steps += 1
            total = 0.0
            for domain in range(num_domains):
                heat[domain] = 0.0
                for rank in range(domain * ranks_per_domain, (domain + 1) * ranks_per_domain):
                    heat[domain] = max(heat[domain], ranks[rank, COST])
                    total += ranks[rank, COST]
            pays = max(least_gain, WORTH * slot_price * (1 << doublings))
            least = total * pays * min(MANY_RANKS / num_ranks, 1.0)
            changed = False
            for _ in range(num_domains):
                hottest = 0
                for domain in range(num_domains):
                    if heat[domain] > heat[hottest]:
                        hottest = domain
                heat[hottest] = -1.0
                first = hottest * ranks_per_domain
                num_tried, num_cool = number(0), number(NUM_COOL)
                while not changed and num_cool <= most_cool:
                    changed = _step(
                        state,
                        first,
                        first + ranks_per_domain,
                        where,
                        prices,
                        max_moves - moves,
                        doublings,
                        least,
                        num_tried,
                        num_cool,
                        scratch,
                    )
                    num_tried, num_cool = num_cool, 2 * num_cool
                if changed:
                    break
            price, moves = spent(expert, where, prices)
    copy_placement(best_expert, best_share, expert, share)
    fill(state)
    settle_all(state, stages[-1], number(3), 1e-3)
    return expected_balance(ranks, weight) - slot_price * spent(expert, where, prices)[0]
