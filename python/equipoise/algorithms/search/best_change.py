"""Finds the change between two sets of ranks that lowers the cost most per price.

Notation, for a hot rank h, a cool rank c, scenarios s of weight w_s and C = sum_s w_s sum_r load_rs ** q the cost of
layer_state.py (a power-sum, or p-norm, surrogate of the maximum)::

    slope_rs = (dC / d tokens of r in s) / q        the columns SLOPE.. of LayerState.ranks
    load_ps                                         what slot p adds to its rank in scenario s

C is convex, so no change gains more than its first-order gain: C(x + d) >= C(x) + C'(x) d. Three steps, each dismissing
what cannot beat the best change so far, leave few exact gains to compute:

1. :func:`candidates`: for each slot of c, what it frees at most when it is overwritten, and what it sends back at most
   when it is swapped;
2. :func:`bounds`: for the pair (h, c), how far any exchange between them can lower the cost;
3. :func:`exact_gains`: each pair of slots whose bounds leave room for a new best.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from equipoise.algorithms.forecast.scenarios import NUM_SCENARIOS
from equipoise.algorithms.search.changes import (
    cheapest_remaining,
    exchange_bound,
    first_order_gain,
    overwrite_gain,
    slot_loads,
    swap_gain,
)
from equipoise.algorithms.search.even_split import even_change_gain, even_overwrite_gain
from equipoise.algorithms.search.layer_state import COST, COUNT, NOISE, SLOPE, LayerState
from equipoise.algorithms.search.move_price import ON_RANK
from equipoise.algorithms.search.shares import marginal
from equipoise.jit.compile import helper, inlined, int_zeros, number, zeros

NUM_HOT = 3  # ranks whose load a step tries to lower
FREE = 0.05  # price that a change without a move is ranked by


class Change(NamedTuple):
    """A change of a placement; ``slot_1`` is -1 where none was good enough."""

    rate: float  # gain per price
    slot_1: int  # slot of the hot rank
    slot_2: int  # slot of the cool rank
    remaining: int  # overwrite: the replica that takes over what slot_2 had; swap: -1
    part: float  # overwrite: the share that slot_2 takes from slot_1


class Scratch(NamedTuple):
    """Memory of one search, made once: the inner functions allocate nothing."""

    loads: np.ndarray  # (NUM_HOT + 2, max(S, 2), NUM_SCENARIOS): hot ranks' slots, a cool rank's slots, saved loads
    remaining: np.ndarray  # (S,) int64, see cheapest_remaining; -1 for a slot that may not be overwritten
    freed: np.ndarray  # (S,) bound on what overwriting a slot frees
    back: np.ndarray  # (S,) bound on what a swap gains by sending a slot's load to the hot rank
    limit: np.ndarray  # (S,) bound on what any exchange gains when a slot is overwritten


@helper
def new_scratch(slots_per_rank: int) -> Scratch:
    return Scratch(
        np.empty((NUM_HOT + 2, max(slots_per_rank, 2), NUM_SCENARIOS)),
        int_zeros(slots_per_rank),
        zeros(slots_per_rank),
        zeros(slots_per_rank),
        zeros(slots_per_rank),
    )


@inlined
def candidates(state: LayerState, cool_rank: int, scratch: Scratch, even: bool) -> float:
    """Fills ``remaining`` and ``freed`` for the slots of a cool rank; the largest of ``freed``.

    Slot r of expert b leaves its share w_r to the replica j of b that takes it most cheaply::

        freed_r = sum_s slope_cs load_rs - w_r marginal(j)
    """
    expert, _, share, replicas, _, ranks, experts, _ = state
    size = expert.shape[0] // ranks.shape[0]
    cool, remaining, freed = scratch.loads[NUM_HOT], scratch.remaining, scratch.freed
    slot_loads(expert, share, experts, cool_rank, size, cool)
    max_freed = -np.inf
    for k in range(size):
        slot = cool_rank * size + k
        remaining[k] = -1
        if replicas[expert[slot], COUNT] > 1:
            if even:
                # All replicas but this one take a larger part: this one's goes as well, hence its change is undone.
                e, n = expert[slot], replicas[expert[slot], COUNT]
                remaining[k], freed[k] = slot, even_change_gain(state, e, n - 1)
                part, risk = 1.0 / (n - 1), experts[e, NOISE] / (n - 1)
                for s in range(NUM_SCENARIOS):
                    grown = part * (experts[e, s] + risk) - cool[k, s]
                    freed[k] += ranks[cool_rank, SLOPE + s] * grown
            else:
                remaining[k], cost = cheapest_remaining(state, slot, size)
                freed[k] = -cost
            for s in range(NUM_SCENARIOS):
                freed[k] += ranks[cool_rank, SLOPE + s] * cool[k, s]
            max_freed = max(max_freed, freed[k])
    return max_freed


@inlined
def bounds(
    state: LayerState, hot_rank: int, cool_rank: int, doublings: int, scratch: Scratch, even: bool
) -> tuple[float, float]:
    """Fills ``back`` and ``limit`` for a pair of ranks; the largest of ``back``, and the bound on any swap.

    First order, for slot r of c going to h: ``back_r = sum_s (slope_cs - slope_hs) load_rs``. And two ranks can do no
    better than to become level: ``exchange_bound`` in changes.py (not where replicas share alike: all of them change).
    """
    ranks, weight, size = state.ranks, state.weight, scratch.back.shape[0]
    cool, remaining, back, limit = scratch.loads[NUM_HOT], scratch.remaining, scratch.back, scratch.limit
    max_back = -np.inf
    for k in range(size):
        back[k] = first_order_gain(ranks, cool, k, cool_rank, hot_rank)
        max_back = max(max_back, back[k])
    any_swap = exchange_bound(ranks, weight, hot_rank, cool_rank, cool, number(-1), doublings)
    for k in range(size):
        if remaining[k] >= 0:
            limit[k] = exchange_bound(ranks, weight, hot_rank, cool_rank, cool, k, doublings) if not even else np.inf
    return max_back, any_swap


@helper
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
    max_freed: float,
    max_back: float,
    any_swap: float,
    even: bool,
    best: Change,
) -> Change:
    """The better of ``best`` and the best change between a hot rank's slots, loads ``hot``, and a cool rank's.

    For slot p of h, with share w of expert a, first order::

        out_p  = sum_s (slope_hs - slope_cs) load_ps              a swap sends all of it:     gain <= q (out + back)
        rate_p = w (marginal of a on h - marginal of a on c)      an overwrite at most all:   gain <= q (rate + freed)
    """
    expert, _, share, _, held, ranks, _, weight = state
    _, remaining, freed, back, limit = scratch
    cool, saved = scratch.loads[NUM_HOT], scratch.loads[NUM_HOT + 1]
    size, q = remaining.shape[0], float(1 << doublings)
    top, slot_1, slot_2, best_remaining, best_t = best
    for k_1 in range(size):
        p = hot_rank * size + k_1
        e, part = expert[p], share[p]
        if part <= 0.0 or held[cool_rank, e] > 0:
            continue
        out = first_order_gain(ranks, hot, k_1, hot_rank, cool_rank)
        rate = _overwrite_rate(state, p, hot_rank, cool_rank, even)
        comes_from, stays_at = origin[cool_rank, e], origin[hot_rank, e]
        for k in range(size if q * max(out + max_back, rate + max_freed) > top * FREE else 0):
            slot = cool_rank * size + k
            other, was = expert[slot], origin[cool_rank, expert[slot]]
            # Undoing a move gives its price back; a change that costs nothing is ranked as if it cost FREE.
            price = prices[comes_from] - prices[was]
            more = (comes_from != ON_RANK) - (was != ON_RANK)
            if remaining[k] >= 0 and rate > 0.0 and more <= room:
                pay = max(price, FREE)
                if min(q * (rate + freed[k]), limit[k]) > top * pay:
                    if even:
                        gain, t = even_overwrite_gain(state, slot, e, doublings), 1.0
                    else:
                        gain, t = overwrite_gain(state, p, slot, remaining[k], doublings, saved)
                    if gain > top * pay and t > 0.0:
                        top, slot_1, slot_2, best_remaining, best_t = gain / pay, p, slot, remaining[k], t
            if min(q * (out + back[k]), any_swap) > top * FREE and held[hot_rank, other] == 0:
                goes_to = origin[hot_rank, other]
                pay = max(price + prices[goes_to] - prices[stays_at], FREE)
                more += (goes_to != ON_RANK) - (stays_at != ON_RANK)
                if more <= room and min(q * (out + back[k]), any_swap) > top * pay:
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
        max_freed = candidates(state, cool_rank, scratch, even)
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
                max_freed,
                max_back,
                any_swap,
                even,
                best,
            )
    return best
