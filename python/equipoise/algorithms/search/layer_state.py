"""Holds one layer's placement and its rank loads, updated change by change.

The cost of a placement is a power-sum (p-norm) surrogate of the maximum over scenarios s and ranks r,
``sum_s weight_s sum_r load_rs ** q``, with ``q = 2 ** doublings``. A slot that takes the share ``w`` of its expert adds
``w (tokens_s + noise w)`` to its rank, divided by the rank's speed. The second term is the price of risk: a rank load
with variance v around m has the expected power ``m**q (1 + q (q - 1) / 2 v / m**2 + ...)``, which near m = 1 is a load
larger by ``(q - 1) / 2 v``; and a share w of an expert has ``w**2`` times the expert's variance. It spreads unsteady
experts over more replicas.

Functions here are numba kernels that a search calls millions of times. They allocate nothing, work on four scenarios
at a time, and take single arrays rather than the whole state: numba counts a reference for each field it reads.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from equipoise.algorithms.forecast.scenarios import NUM_SCENARIOS
from equipoise.jit.compile import helper, int_zeros

TINY = 1e-9
# Columns of LayerState.ranks; the load per scenario comes first, then the slope per scenario.
SLOPE, COST, INVERSE_SPEED, RANK_COLUMNS = (
    NUM_SCENARIOS,
    2 * NUM_SCENARIOS,
    2 * NUM_SCENARIOS + 1,
    2 * NUM_SCENARIOS + 2,
)
NOISE = NUM_SCENARIOS  # column of LayerState.experts
FIRST, COUNT = 0, 1  # columns of LayerState.replicas


class LayerState(NamedTuple):
    """Arrays that describe one layer; the slots of ranks that are gone hold experts but take no part."""

    expert: np.ndarray  # (P,) int64, logical expert in each slot
    following: np.ndarray  # (P,) int64, next slot of the same expert, -1: last
    share: np.ndarray  # (P,) float64, share of its expert's tokens
    replicas: np.ndarray  # (E, 2) int64: first slot of an expert (-1: none), and how many it has
    held: np.ndarray  # (G, E) uint8, replicas of an expert on a rank
    ranks: np.ndarray  # (G, RANK_COLUMNS) float64: load per scenario, d cost / d tokens / q per scenario, cost, 1/speed
    experts: np.ndarray  # (E, NUM_SCENARIOS + 1) float64: tokens per scenario, variance times the price of risk
    weight: np.ndarray  # (NUM_SCENARIOS,) float64, of the scenarios


@helper
def new_state(
    expert: np.ndarray, share: np.ndarray, experts: np.ndarray, weight: np.ndarray, inverse_speed: np.ndarray
) -> LayerState:
    """The state of a placement; the arrays are used, not copied. ``inverse_speed`` is 0 for a rank that is gone."""
    num_slots, num_experts, num_ranks = expert.shape[0], experts.shape[0], inverse_speed.shape[0]
    state = LayerState(
        expert,
        int_zeros(num_slots),
        share,
        np.empty((num_experts, 2), dtype=np.int64),
        np.empty((num_ranks, num_experts), dtype=np.uint8),
        np.empty((num_ranks, RANK_COLUMNS)),
        experts,
        weight,
    )
    for rank in range(num_ranks):
        for column in range(RANK_COLUMNS):
            state.ranks[rank, column] = 0.0
        state.ranks[rank, INVERSE_SPEED] = inverse_speed[rank]
    fill(state)
    return state


@helper
def fill(state: LayerState) -> None:
    """Rebuilds the lists of replicas and the loads from ``expert`` and ``share``."""
    expert, following, share, replicas, held, ranks, experts, _ = state
    size = expert.shape[0] // ranks.shape[0]
    for e in range(replicas.shape[0]):
        replicas[e, FIRST], replicas[e, COUNT] = -1, 0
    for rank in range(ranks.shape[0]):
        for e in range(replicas.shape[0]):
            held[rank, e] = 0
        for s in range(NUM_SCENARIOS):
            ranks[rank, s] = 0.0
    for slot in range(expert.shape[0] - 1, -1, -1):
        if ranks[slot // size, INVERSE_SPEED] > 0.0:
            link(expert, following, replicas, held, slot, expert[slot])
            part = share[slot]
            share[slot] = 0.0
            add_share(expert, share, ranks, experts, slot, part)


@helper
def copy_placement(expert: np.ndarray, share: np.ndarray, to_expert: np.ndarray, to_share: np.ndarray) -> None:
    for slot in range(expert.shape[0]):
        to_expert[slot], to_share[slot] = expert[slot], share[slot]


@helper
def power(x: float, doublings: int) -> float:
    for _ in range(doublings):
        x *= x
    return x


Lanes = tuple[float, float, float, float]  # a value for each scenario


@helper
def powers(x: Lanes, doublings: int) -> Lanes:
    """``power`` for all scenarios: one chain of vector multiplications in place of four."""
    a, b, c, d = x
    for _ in range(doublings):
        a *= a
        b *= b
        c *= c
        d *= d
    return a, b, c, d


@helper
def changed_loads(ranks: np.ndarray, rank: int, experts: np.ndarray, e: int, share: float, risk: float) -> Lanes:
    """A rank's loads with so much more of an expert's share, and of its price of risk; above 0."""
    slow = ranks[rank, INVERSE_SPEED]
    return (
        max(ranks[rank, 0] + (share * experts[e, 0] + risk) * slow, TINY),
        max(ranks[rank, 1] + (share * experts[e, 1] + risk) * slow, TINY),
        max(ranks[rank, 2] + (share * experts[e, 2] + risk) * slow, TINY),
        max(ranks[rank, 3] + (share * experts[e, 3] + risk) * slow, TINY),
    )


@helper
def link(
    expert: np.ndarray, following: np.ndarray, replicas: np.ndarray, held: np.ndarray, slot: int, new: int
) -> None:
    """Puts the expert ``new`` into a slot that is in no list."""
    expert[slot] = new
    following[slot] = replicas[new, FIRST]
    replicas[new, FIRST] = slot
    replicas[new, COUNT] += 1
    held[slot // (expert.shape[0] // held.shape[0]), new] += 1


@helper
def relink(
    expert: np.ndarray, following: np.ndarray, replicas: np.ndarray, held: np.ndarray, slot: int, new: int
) -> None:
    """Replaces a slot's expert, which must have no share in it any more, by ``new``."""
    old = expert[slot]
    if replicas[old, FIRST] == slot:
        replicas[old, FIRST] = following[slot]
    else:
        before = replicas[old, FIRST]
        while following[before] != slot:
            before = following[before]
        following[before] = following[slot]
    replicas[old, COUNT] -= 1
    held[slot // (expert.shape[0] // held.shape[0]), old] -= 1
    link(expert, following, replicas, held, slot, new)


@helper
def add_share(
    expert: np.ndarray, share: np.ndarray, ranks: np.ndarray, experts: np.ndarray, slot: int, change: float
) -> None:
    """Changes a slot's share, and its rank's load with it; ``refresh`` the rank afterwards."""
    rank, e = slot // (share.shape[0] // ranks.shape[0]), expert[slot]
    slow = ranks[rank, INVERSE_SPEED]
    risk = experts[e, NOISE] * change * (2.0 * share[slot] + change)
    for s in range(NUM_SCENARIOS):
        ranks[rank, s] += (change * experts[e, s] + risk) * slow
    share[slot] += change


@helper
def refresh(ranks: np.ndarray, weight: np.ndarray, rank: int, doublings: int) -> None:
    """Recomputes cost and slope of a rank from its load."""
    loads = (max(ranks[rank, 0], TINY), max(ranks[rank, 1], TINY), max(ranks[rank, 2], TINY), max(ranks[rank, 3], TINY))
    costs, slow, total = powers(loads, doublings), ranks[rank, INVERSE_SPEED], 0.0
    for s in range(NUM_SCENARIOS):
        part = weight[s] * costs[s]
        total += part
        ranks[rank, SLOPE + s] = part / loads[s] * slow
    ranks[rank, COST] = total


@helper
def expected_balance(ranks: np.ndarray, weight: np.ndarray) -> float:
    """Mean rank load (which is 1) over the maximum, averaged over the scenarios."""
    balance = 0.0
    for s in range(NUM_SCENARIOS):
        if weight[s] > 0.0:
            top = TINY
            for rank in range(ranks.shape[0]):
                top = max(top, ranks[rank, s])
            balance += weight[s] / top
    return balance
