"""Bounds what changes between two ranks can gain, before any is computed (notation: best_change.py).

1. :func:`candidates`: for each slot of a cool rank c, what it frees at most when it is overwritten, and what moving its
   expert away gives back;
2. :func:`bounds`: for a pair (h, c), what a slot of c gains at most when a swap sends it to h, and how far any exchange
   between the two can lower the cost.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from equipoise.algorithms.forecast.scenarios import NUM_SCENARIOS
from equipoise.algorithms.search.changes import cheapest_remaining, exchange_bound, first_order_gain, slot_loads
from equipoise.algorithms.search.even_split import even_change_gain
from equipoise.algorithms.search.layer_state import COUNT, NOISE, SLOPE, LayerState
from equipoise.algorithms.search.move_price import ON_RANK
from equipoise.jit.compile import helper, inlined, int_zeros, number, zeros

NUM_HOT = 3  # ranks whose load a step tries to lower


class Scratch(NamedTuple):
    """Memory of one search, made once: the inner functions allocate nothing."""

    loads: np.ndarray  # (NUM_HOT + 2, max(S, 2), NUM_SCENARIOS): hot ranks' slots, a cool rank's slots, saved loads
    remaining: np.ndarray  # (S,) int64, see cheapest_remaining; -1 for a slot that may not be overwritten
    freed: np.ndarray  # (S,) bound on what overwriting a slot frees
    burden: np.ndarray  # (S,) what its share costs at least (over q) where it goes then
    back: np.ndarray  # (S,) bound on what a swap gains by sending a slot's load to the hot rank
    limit: np.ndarray  # (S,) bound on what any exchange gains when a slot is overwritten
    refund: np.ndarray  # (S,) price that a slot's expert gives back when it leaves its rank
    undone: np.ndarray  # (S,) int64, moves that are undone when it leaves: 1 or 0


@helper
def new_scratch(slots_per_rank: int) -> Scratch:
    return Scratch(
        np.empty((NUM_HOT + 2, max(slots_per_rank, 2), NUM_SCENARIOS)),
        int_zeros(slots_per_rank),
        zeros(slots_per_rank),
        zeros(slots_per_rank),
        zeros(slots_per_rank),
        zeros(slots_per_rank),
        zeros(slots_per_rank),
        int_zeros(slots_per_rank),
    )


@inlined
def candidates(
    state: LayerState, cool_rank: int, origin: np.ndarray, prices: np.ndarray, scratch: Scratch, even: bool
) -> tuple[float, float]:
    """Fills ``remaining``, ``freed``, ``refund`` and ``undone`` for the slots of a cool rank; the largest of two.

    Slot r of expert b leaves its share w_r to the replica j of b that takes it most cheaply::

        freed_r = sum_s slope_cs load_rs - w_r marginal(j)
    """
    expert, _, share, replicas, _, ranks, experts, _ = state
    size = expert.shape[0] // ranks.shape[0]
    cool, remaining, freed = scratch.loads[NUM_HOT], scratch.remaining, scratch.freed
    slot_loads(expert, share, experts, cool_rank, size, cool)
    max_freed, max_refund = -np.inf, 0.0
    for k in range(size):
        slot = cool_rank * size + k
        was = origin[cool_rank, expert[slot]]
        scratch.refund[k], scratch.undone[k] = prices[was], was != ON_RANK
        max_refund = max(max_refund, prices[was])
        remaining[k] = -1
        if replicas[expert[slot], COUNT] > 1:
            scratch.burden[k] = 0.0
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
                freed[k], scratch.burden[k] = -cost, cost
            for s in range(NUM_SCENARIOS):
                freed[k] += ranks[cool_rank, SLOPE + s] * cool[k, s]
            max_freed = max(max_freed, freed[k])
    return max_freed, max_refund


@inlined
def bounds(
    state: LayerState, hot_rank: int, cool_rank: int, doublings: int, scratch: Scratch, even: bool
) -> tuple[float, float]:
    """Fills ``back`` and ``limit`` for a pair of ranks; the largest of ``back``, and the bound on any swap.

    First order, for slot r of c going to h: ``back_r = sum_s (slope_cs - slope_hs) load_rs``. And two ranks can do no
    better than to become level: ``exchange_bound`` in changes.py (not where replicas share alike: all of them change).
    What is overwritten burdens a third rank by its first-order cost at least; what is split carries less risk, which
    is not in ``limit`` but in :func:`split_relief`.
    """
    ranks, weight, size = state.ranks, state.weight, scratch.back.shape[0]
    cool, remaining, back, limit = scratch.loads[NUM_HOT], scratch.remaining, scratch.back, scratch.limit
    q = float(1 << doublings)
    max_back = -np.inf
    for k in range(size):
        back[k] = first_order_gain(ranks, cool, k, cool_rank, hot_rank)
        max_back = max(max_back, back[k])
    any_swap = exchange_bound(ranks, weight, hot_rank, cool_rank, cool, number(-1), doublings)
    for k in range(size):
        if remaining[k] >= 0:
            limit[k] = exchange_bound(ranks, weight, hot_rank, cool_rank, cool, k, doublings) if not even else np.inf
            if remaining[k] // size != hot_rank:
                limit[k] -= q * scratch.burden[k]
    return max_back, any_swap


@helper
def split_relief(ranks: np.ndarray, experts: np.ndarray, rank: int, e: int, share: float) -> float:
    """What a rank saves at most (over q) because a share of expert ``e`` carries half the risk when split."""
    slope = 0.0
    for s in range(NUM_SCENARIOS):
        slope += ranks[rank, SLOPE + s]
    return 0.5 * slope * experts[e, NOISE] * share * share
