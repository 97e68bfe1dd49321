"""Finds the change between two sets of ranks that lowers the cost most per price.

Notation, for a hot rank h, a cool rank c, scenarios s of weight w_s and C = sum_s w_s sum_r load_rs ** q the cost of
layer_state.py (a power-sum, or p-norm, surrogate of the maximum)::

    slope_rs = (dC / d tokens of r in s) / q        the columns SLOPE.. of LayerState.ranks
    load_ps                                         what slot p adds to its rank in scenario s

C is convex, so no change gains more than its first-order gain: C(x + d) >= C(x) + C'(x) d. Bounds on what a slot of c
and the pair (h, c) can gain (change_bounds.py) dismiss what cannot beat the best change so far; :func:`exact_gains`
computes the others.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from equipoise.algorithms.search.change_bounds import NUM_HOT, Scratch, bounds, candidates, split_relief
from equipoise.algorithms.search.changes import first_order_gain, overwrite_gain, slot_loads, swap_gain
from equipoise.algorithms.search.even_split import even_change_gain, even_overwrite_gain
from equipoise.algorithms.search.layer_state import COST, COUNT, LayerState
from equipoise.algorithms.search.move_price import ON_RANK
from equipoise.algorithms.search.shares import marginal
from equipoise.jit.compile import helper, inlined, number

FREE = 0.05  # price that a change without a move is ranked by


class Change(NamedTuple):
    """A change of a placement; ``slot_1`` is -1 where none was good enough."""

    rate: float  # gain per price
    slot_1: int  # slot of the hot rank
    slot_2: int  # slot of the cool rank
    remaining: int  # overwrite: the replica that takes over what slot_2 had; swap: -1
    part: float  # overwrite: the share that slot_2 takes from slot_1


class PairBounds(NamedTuple):
    """The largest over the slots of a cool rank, and of its exchanges with a hot one; see change_bounds.py."""

    freed: float
    refund: float
    back: float
    swap: float


@inlined
def _overwrite_rate(state: LayerState, slot: int, hot_rank: int, cool_rank: int, even: bool) -> float:
    """Bound (over q) on what a further replica on a cool rank gains for the expert of a hot rank's slot."""
    expert, _, share, replicas, _, ranks, experts, _ = state
    e, part = expert[slot], share[slot]
    if even:
        n = replicas[e, COUNT] + 1
        return even_change_gain(state, e, n) - marginal(ranks, experts, cool_rank, e, 0.5 / n) / n
    return part * (marginal(ranks, experts, hot_rank, e, part) - marginal(ranks, experts, cool_rank, e, 0.0))


@inlined
def exact_gains(
    state: LayerState,
    hot: np.ndarray,
    hot_rank: int,
    cool_rank: int,
    origin: np.ndarray,
    prices: np.ndarray,
    room: int,
    doublings: int,
    scratch: Scratch,
    pair: PairBounds,
    even: bool,
    best: Change,
) -> Change:
    """The better of ``best`` and the best change between a hot rank's slots, loads ``hot``, and a cool rank's.

    For slot p of h, with share w of expert a, first order::

        out_p  = sum_s (slope_hs - slope_cs) load_ps              a swap sends all of it:     gain <= q (out + back)
        rate_p = w (marginal of a on h - marginal of a on c)      an overwrite at most all:   gain <= q (rate + freed)
    """
    expert, _, share, _, held, ranks, experts, weight = state
    _, remaining, freed, _, back, limit, refund, undone = scratch
    cool, saved = scratch.loads[NUM_HOT], scratch.loads[NUM_HOT + 1]
    size, q = remaining.shape[0], float(1 << doublings)
    top, slot_1, slot_2, best_remaining, best_t = best
    for k_1 in range(size):
        p = hot_rank * size + k_1
        e, part = expert[p], share[p]
        if part <= 0.0 or held[cool_rank, e] > 0:
            continue
        comes_from, stays_at = origin[cool_rank, e], origin[hot_rank, e]
        # Undoing a move gives its price back; a change that costs nothing is ranked as if it cost FREE.
        overwrite_price, swap_price = prices[comes_from], prices[comes_from] - prices[stays_at]
        rate = _overwrite_rate(state, p, hot_rank, cool_rank, even)
        out = first_order_gain(ranks, hot, k_1, hot_rank, cool_rank)
        relief = q * split_relief(ranks, experts, hot_rank, e, part)
        overwrites = rate > 0.0 and q * (rate + pair.freed) > top * max(overwrite_price - pair.refund, FREE)
        swaps = min(q * (out + pair.back), pair.swap) > top * max(swap_price - pair.refund, FREE)
        for k in range(size if overwrites or swaps else 0):
            slot = cool_rank * size + k
            more, pay = (comes_from != ON_RANK) - undone[k], max(overwrite_price - refund[k], FREE)
            possible = overwrites and remaining[k] >= 0 and more <= room
            if possible and min(q * (rate + freed[k]), limit[k] + relief) > top * pay:
                if even:
                    gain, t = even_overwrite_gain(state, slot, e, doublings), 1.0
                else:
                    gain, t = overwrite_gain(state, p, slot, remaining[k], doublings, saved)
                if gain > top * pay and t > 0.0:
                    top, slot_1, slot_2, best_remaining, best_t = gain / pay, p, slot, remaining[k], t
            bound, pay = min(q * (out + back[k]), pair.swap), swap_price - refund[k]
            if swaps and bound > top * max(pay, FREE) and held[hot_rank, expert[slot]] == 0:
                goes_to = origin[hot_rank, expert[slot]]
                pay = max(pay + prices[goes_to], FREE)
                more += (goes_to != ON_RANK) - (stays_at != ON_RANK)
                if more <= room and bound > top * pay:
                    gain = swap_gain(ranks, weight, hot, k_1, hot_rank, cool, k, cool_rank, doublings)
                    if gain > top * pay:
                        top, slot_1, slot_2, best_remaining = gain / pay, p, slot, number(-1)
    return Change(top, slot_1, slot_2, best_remaining, best_t)


@helper
def best_change(
    state: LayerState,
    hot: np.ndarray,
    cool: np.ndarray,
    origin: np.ndarray,
    prices: np.ndarray,
    room: int,
    doublings: int,
    min_rate: float,
    scratch: Scratch,
    even: bool,
) -> Change:
    """The best change that moves load from the ranks ``hot`` to the ranks ``cool`` and gains over ``min_rate``.

    ``room`` is the number of moves that are left; ``hot`` holds at most :data:`NUM_HOT` ranks.
    """
    ranks, size = state.ranks, scratch.back.shape[0]
    for i in range(hot.shape[0]):
        slot_loads(state.expert, state.share, state.experts, hot[i], size, scratch.loads[i])
    best = Change(min_rate, number(-1), number(-1), number(-1), 0.0)
    for cool_rank in cool:
        max_freed, max_refund = candidates(state, cool_rank, origin, prices, scratch, even)
        for i in range(hot.shape[0]):
            if hot[i] == cool_rank or ranks[hot[i], COST] <= ranks[cool_rank, COST]:
                continue
            max_back, any_swap = bounds(state, hot[i], cool_rank, doublings, scratch, even)
            best = exact_gains(
                state,
                scratch.loads[i],
                hot[i],
                cool_rank,
                origin,
                prices,
                room,
                doublings,
                scratch,
                PairBounds(max_freed, max_refund, max_back, any_swap),
                even,
                best,
            )
    return best
