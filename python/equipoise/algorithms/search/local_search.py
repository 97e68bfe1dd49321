"""Searches from the placement in force for the fewest priced changes that balance the load to come.

Each step looks at the slots of the hottest ranks against those of the coolest ones and applies the change that lowers
the cost (layer_state.py) most per price: two slots swap their experts, or a redundant slot is overwritten with a
replica of a hot rank's expert, whose best share is solved along with it. The cost is convex, so a first-order gain
bounds what a change can gain, and most are dismissed by it (best_change.py). After each change the shares of the
replicated experts around it are optimised again. A change that undoes a move gives its price back.

The search walks on a little past the point where moves pay, and the best placement on its way wins: the one with the
largest expected balance minus price. So each prefix of the walk is a budget that was tried.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from equipoise.algorithms.search.best_change import Change, best_change
from equipoise.algorithms.search.change_bounds import NUM_HOT, Scratch, new_scratch
from equipoise.algorithms.search.changes import apply_change, swap
from equipoise.algorithms.search.even_split import overwrite_evenly
from equipoise.algorithms.search.layer_state import (
    COST,
    INVERSE_SPEED,
    LayerState,
    copy_placement,
    expected_balance,
    fill,
    refresh,
)
from equipoise.algorithms.search.move_price import ON_RANK, MoveTerms, spent
from equipoise.algorithms.search.shares import optimise_shares
from equipoise.jit.compile import helper, inlined, int_zeros, number, zeros

PATIENCE = 8  # steps without a new best before a stage ends; one for every four ranks where those are more
WORTH = 0.3  # of what a change must gain to pay: below, it is not even walked through
MANY_RANKS = 32  # beyond, one step is a smaller part of the whole, and may gain as much less


class SearchOptions(NamedTuple):
    """How far a search goes."""

    stages: np.ndarray  # int64, exponents of the surrogate, one after the other, as doublings (3 is q = 8)
    max_steps: int  # most changes tried
    min_gain: float  # part of the cost that a step must gain, even for free; for many ranks less, as it is of any step
    num_cool: int  # ranks a step tries to put load on, the coolest; then twice as many, as long as they offer nothing
    max_cool: int  # up to so many, at least ``num_cool``
    even: bool  # replicas share alike, no shares are solved
    ranks_per_domain: int  # experts stay within such a block of ranks: all of them, or a node


@helper
def _pick_ranks(ranks: np.ndarray, first: int, last: int, picked: np.ndarray, most: int, sign: float) -> int:
    """Fills ``picked`` with the ``most`` live ranks of first..last-1 by descending ``sign * cost``; how many."""
    count = 0
    for rank in range(first, last):
        key = sign * ranks[rank, COST]
        if ranks[rank, INVERSE_SPEED] == 0.0 or (count == most and key <= sign * ranks[picked[count - 1], COST]):
            continue
        count = min(count + 1, most)
        i = count - 1
        while i > 0 and sign * ranks[picked[i - 1], COST] < key:
            picked[i] = picked[i - 1]
            i -= 1
        picked[i] = rank
    return count


@helper
def _solve_shares(state: LayerState, doublings: int, even: bool) -> None:
    """Optimises the shares, unless replicas share alike; cost and slope of each rank are up to date afterwards."""
    if even:
        for rank in range(state.ranks.shape[0]):
            refresh(state.ranks, state.weight, rank, doublings)
    else:
        optimise_shares(state, doublings, number(3), 1e-3)


@inlined
def search(state: LayerState, origin: np.ndarray, moves: MoveTerms, options: SearchOptions) -> float:
    """Searches from the state's placement and leaves the best one found in it.

    Args:
        origin: (G, E) from :func:`~equipoise.algorithms.search.move_price.origins_of`.

    Returns:
        Expected balance minus the price of the moves.
    """
    expert, share, ranks, weight = state.expert, state.share, state.ranks, state.weight
    prices, slot_price, _ = moves
    stages, max_steps, num_ranks = options.stages, options.max_steps, ranks.shape[0]
    scratch = new_scratch(expert.shape[0] // num_ranks)
    best_expert, best_share = int_zeros(expert.shape[0]), zeros(share.shape[0])
    price, made = spent(expert, origin, prices)
    value, steps = -np.inf, 0
    for stage in range(stages.shape[0]):
        doublings = stages[stage]
        _solve_shares(state, doublings, options.even)
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
            changed, more_price, more = _step(state, origin, moves, made, options, doublings, scratch)
            price, made = price + more_price, made + more
    copy_placement(best_expert, best_share, expert, share)
    fill(state)
    _solve_shares(state, stages[-1], options.even)
    return expected_balance(ranks, weight) - slot_price * spent(expert, origin, prices)[0]


@inlined
def _step(
    state: LayerState,
    origin: np.ndarray,
    moves: MoveTerms,
    made: int,
    options: SearchOptions,
    doublings: int,
    scratch: Scratch,
) -> tuple[bool, float, int]:
    """Applies the best change in the hottest domain that has one: its price and moves; False if none pays."""
    ranks, size = state.ranks, options.ranks_per_domain
    num_ranks = ranks.shape[0]
    num_domains = num_ranks // size
    heat = zeros(num_domains)
    total = 0.0
    for domain in range(num_domains):
        for rank in range(domain * size, (domain + 1) * size):
            heat[domain] = max(heat[domain], ranks[rank, COST])
            total += ranks[rank, COST]
    # d(balance) = d(max) near a balance of 1, and d(cost) / cost = q d(max) / max where one rank is the cost: a move
    # of price 1 pays where it lowers the cost by the part q * slot_price.
    pays = max(options.min_gain, WORTH * moves.slot_price * (1 << doublings))
    min_rate = total * pays * min(MANY_RANKS / num_ranks, 1.0)
    hot, cool = int_zeros(number(NUM_HOT)), int_zeros(size)
    for _ in range(num_domains):
        hottest = 0
        for domain in range(num_domains):
            if heat[domain] > heat[hottest]:
                hottest = domain
        heat[hottest] = -1.0
        first, last = hottest * size, (hottest + 1) * size
        num_hot = _pick_ranks(ranks, first, last, hot, hot.shape[0], 1.0)
        num_tried, limit = number(0), options.num_cool
        while limit <= options.max_cool:
            num_cool = _pick_ranks(ranks, first, last, cool, min(limit, size), -1.0)
            found = best_change(
                state,
                hot[:num_hot],
                cool[num_tried:num_cool],  # those before are known to offer nothing
                origin,
                moves.prices,
                moves.max_moves - made,
                doublings,
                min_rate,
                scratch,
                options.even,
            )
            if found.slot_1 >= 0:
                less_price, less = _moves_into(state.expert, found, origin, moves.prices)
                _apply(state, found, options.even, doublings)
                price, made = _moves_into(state.expert, found, origin, moves.prices)
                return True, price - less_price, made - less
            num_tried, limit = min(limit, num_cool), 2 * limit
    return False, 0.0, 0


@inlined
def _apply(state: LayerState, found: Change, even: bool, doublings: int) -> None:
    """Applies a change, with cost and slope of each rank up to date afterwards."""
    if not even:
        apply_change(state, found.slot_1, found.slot_2, found.remaining, found.part, doublings)
    elif found.remaining >= 0:
        overwrite_evenly(state, found.slot_2, state.expert[found.slot_1], doublings)
    else:
        swap(state, found.slot_1, found.slot_2)
        for rank in range(state.ranks.shape[0]):
            refresh(state.ranks, state.weight, rank, doublings)


@helper
def _moves_into(expert: np.ndarray, change: Change, origin: np.ndarray, prices: np.ndarray) -> tuple[float, int]:
    """Price and number of the moves into the two slots of a change."""
    size = expert.shape[0] // origin.shape[0]
    one = origin[change.slot_1 // size, expert[change.slot_1]]
    other = origin[change.slot_2 // size, expert[change.slot_2]]
    return prices[one] + prices[other], (one != ON_RANK) + (other != ON_RANK)
