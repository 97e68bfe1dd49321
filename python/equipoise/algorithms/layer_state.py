"""LayerState: one layer's placement with the rank loads that it causes, kept up to date change by change.

The cost of a placement is a soft maximum over scenarios s and ranks r, ``sum_s weight_s sum_r load_rs ** q``, with
``q`` a power of two. A slot that takes the share ``w`` of its expert adds ``w (tokens_s + noise w)`` to its rank, divided by
the rank's speed. The second term is the price of risk: a rank load with variance v around m has the expected power
``m**q (1 + q (q - 1) / 2 v / m**2 + ...)``, which near m = 1 is a load larger by ``(q - 1) / 2 v``; and a share w of an
expert has the variance ``w**2`` times the expert's. It spreads unsteady experts over more replicas.

Functions here are numba kernels that a search calls millions of times: no allocation, four scenarios at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from equipoise.algorithms.scenarios import NUM_SCENARIOS

_TINY = 1e-9


class LayerState(NamedTuple):
    """Arrays that describe one layer; the slots of ranks that are gone take no part."""

    expert: np.ndarray  # (P,) int64, logical expert in each slot
    share: np.ndarray  # (P,) float64, share of its expert's tokens
    first_slot: np.ndarray  # (E,) int64, head of the list of an expert's slots, -1: none
    next_slot: np.ndarray  # (P,) int64, next slot of the same expert, -1: last
    num_replicas: np.ndarray  # (E,) int64, on live ranks
    held: np.ndarray  # (G, E) uint8, replicas of an expert on a rank
    load: np.ndarray  # (G, S) float64, rank load per scenario, over its speed
    slope: np.ndarray  # (G, S) float64, derivative of the cost by a rank's tokens, over q
    cost: np.ndarray  # (G,) float64, a rank's part of the cost
    tokens: np.ndarray  # (E, S) float64
    noise: np.ndarray  # (E,) float64, already times the price of risk
    weight: np.ndarray  # (S,) float64, of the scenarios
    slowness: np.ndarray  # (G,) float64, 1 / speed; 0 for a rank that is gone
    slots_per_rank: int


@numba.njit(cache=True, nogil=True)
def new_state(
    expert: np.ndarray,
    share: np.ndarray,
    tokens: np.ndarray,
    noise: np.ndarray,
    weight: np.ndarray,
    slowness: np.ndarray,
) -> LayerState:
    """The state of the placement ``expert`` with ``share``; both arrays are used, not copied."""
    num_experts, num_ranks = tokens.shape[0], slowness.shape[0]
    state = LayerState(
        expert,
        share,
        np.full(num_experts, -1, dtype=np.int64),
        np.full(expert.shape[0], -1, dtype=np.int64),
        np.zeros(num_experts, dtype=np.int64),
        np.zeros((num_ranks, num_experts), dtype=np.uint8),
        np.zeros((num_ranks, NUM_SCENARIOS)),
        np.zeros((num_ranks, NUM_SCENARIOS)),
        np.zeros(num_ranks),
        tokens,
        noise,
        weight,
        slowness,
        expert.shape[0] // num_ranks,
    )
    fill_lists(state)
    return state


@numba.njit(cache=True, nogil=True)
def fill_lists(state: LayerState) -> None:
    """Rebuilds lists and loads from ``expert`` and ``share``."""
    state.first_slot[:] = -1
    state.num_replicas[:] = 0
    state.held[:] = 0
    state.load[:] = 0.0
    for slot in range(state.expert.shape[0] - 1, -1, -1):
        if state.slowness[slot // state.slots_per_rank] > 0:
            link(state, slot, state.expert[slot])
            share = state.share[slot]
            state.share[slot] = 0.0
            add_share(state, slot, share)


@numba.njit(cache=True, nogil=True)
def power(x: float, doublings: int) -> float:
    for _ in range(doublings):
        x *= x
    return x


@numba.njit(cache=True, nogil=True)
def link(state: LayerState, slot: int, expert: int) -> None:
    """Puts ``expert`` into ``slot``, with no share yet."""
    state.expert[slot] = expert
    state.next_slot[slot] = state.first_slot[expert]
    state.first_slot[expert] = slot
    state.num_replicas[expert] += 1
    state.held[slot // state.slots_per_rank, expert] += 1


@numba.njit(cache=True, nogil=True)
def unlink(state: LayerState, slot: int) -> None:
    """Takes the expert out of ``slot``; its share must have gone elsewhere."""
    expert = state.expert[slot]
    if state.first_slot[expert] == slot:
        state.first_slot[expert] = state.next_slot[slot]
    else:
        before = state.first_slot[expert]
        while state.next_slot[before] != slot:
            before = state.next_slot[before]
        state.next_slot[before] = state.next_slot[slot]
    state.num_replicas[expert] -= 1
    state.held[slot // state.slots_per_rank, expert] -= 1


@numba.njit(cache=True, nogil=True)
def add_share(state: LayerState, slot: int, change: float) -> None:
    """Changes a slot's share, and its rank's load with it; ``refresh`` the rank afterwards."""
    rank, expert, share = slot // state.slots_per_rank, state.expert[slot], state.share[slot]
    slow = state.slowness[rank]
    risk = state.noise[expert] * change * (2.0 * share + change)
    for s in range(NUM_SCENARIOS):
        state.load[rank, s] += (change * state.tokens[expert, s] + risk) * slow
    state.share[slot] = share + change


@numba.njit(cache=True, nogil=True)
def refresh(state: LayerState, rank: int, doublings: int) -> None:
    """Recomputes cost and slope of a rank from its load."""
    total = 0.0
    for s in range(NUM_SCENARIOS):
        load = max(state.load[rank, s], _TINY)
        part = state.weight[s] * power(load, doublings)
        total += part
        state.slope[rank, s] = part / load * state.slowness[rank]
    state.cost[rank] = total


@numba.njit(cache=True, nogil=True)
def refresh_all(state: LayerState, doublings: int) -> None:
    for rank in range(state.cost.shape[0]):
        refresh(state, rank, doublings)


@numba.njit(cache=True, nogil=True)
def marginal(state: LayerState, rank: int, expert: int, share: float) -> float:
    """Cost (over q) of one more unit of ``expert``'s share on ``rank``, which has ``share`` of it."""
    risk = 2.0 * state.noise[expert] * share
    total = 0.0
    for s in range(NUM_SCENARIOS):
        total += state.slope[rank, s] * (state.tokens[expert, s] + risk)
    return total


@numba.njit(cache=True, nogil=True)
def whole(state: LayerState, rank: int, expert: int, share: float) -> float:
    """First-order cost (over q) of ``share`` of ``expert`` arriving on ``rank``."""
    risk = state.noise[expert] * share
    total = 0.0
    for s in range(NUM_SCENARIOS):
        total += state.slope[rank, s] * (state.tokens[expert, s] + risk)
    return total * share


@numba.njit(cache=True, nogil=True)
def best_transfer(
    state: LayerState, expert: int, source: int, target: int, has: float, gets: float, doublings: int
) -> float:
    """The part of ``expert``'s share that best goes from rank ``source`` (which has ``has``) to ``target`` (``gets``).

    Newton's method on a convex function of one number.
    """
    q = float(1 << doublings)
    slow_1, slow_2 = state.slowness[source], state.slowness[target]
    noise = state.noise[expert]
    low, high, t = 0.0, has, 0.0
    for _ in range(6):
        slope, curve = 0.0, 0.0
        gone, come = noise * t * (2.0 * has - t), noise * t * (2.0 * gets + t)
        for s in range(NUM_SCENARIOS):
            tokens = state.tokens[expert, s]
            load_1 = max(state.load[source, s] - (t * tokens + gone) * slow_1, _TINY)
            load_2 = max(state.load[target, s] + (t * tokens + come) * slow_2, _TINY)
            rate_1 = (tokens + 2.0 * noise * (has - t)) * slow_1
            rate_2 = (tokens + 2.0 * noise * (gets + t)) * slow_2
            part_1 = state.weight[s] * power(load_1, doublings) / load_1
            part_2 = state.weight[s] * power(load_2, doublings) / load_2
            slope += rate_2 * part_2 - rate_1 * part_1
            curve += (q - 1.0) * (rate_1 * rate_1 * part_1 / load_1 + rate_2 * rate_2 * part_2 / load_2)
            curve += 2.0 * noise * (part_1 * slow_1 + part_2 * slow_2)
        if curve <= 0.0:
            break
        if slope < 0.0:
            low = t
        else:
            high = t
        step = min(max(t - slope / curve, low), high)
        if abs(step - t) <= 1e-4 * has:
            t = step
            break
        t = step
    return t


@numba.njit(cache=True, nogil=True)
def settle(state: LayerState, expert: int, doublings: int, tolerance: float) -> float:
    """Moves share between the dearest and the cheapest replica of ``expert`` until they agree; returns the gain."""
    gain = 0.0
    for _ in range(state.num_replicas[expert] - 1):
        dear, cheap, most, least = -1, -1, -1.0, np.inf
        slot = state.first_slot[expert]
        while slot >= 0:
            price = marginal(state, slot // state.slots_per_rank, expert, state.share[slot])
            if state.share[slot] > 0.0 and price > most:
                dear, most = slot, price
            if price < least:
                cheap, least = slot, price
            slot = state.next_slot[slot]
        source, target = dear // state.slots_per_rank, cheap // state.slots_per_rank
        if dear < 0 or source == target or most - least <= tolerance * most:
            break
        has = state.share[dear]
        t = best_transfer(state, expert, source, target, has, state.share[cheap], doublings)
        if t <= 0.0:
            break
        before = state.cost[source] + state.cost[target]
        add_share(state, dear, -has if has - t < _TINY else -t)
        add_share(state, cheap, has if has - t < _TINY else t)
        refresh(state, source, doublings)
        refresh(state, target, doublings)
        gain += before - state.cost[source] - state.cost[target]
    return gain


@numba.njit(cache=True, nogil=True)
def settle_all(state: LayerState, doublings: int, rounds: int, tolerance: float) -> None:
    """Re-solves all shares: round after round over the replicated experts until a round gains next to nothing."""
    refresh_all(state, doublings)
    for _ in range(rounds):
        gain, total = 0.0, 0.0
        for expert in range(state.first_slot.shape[0]):
            if state.num_replicas[expert] > 1:
                gain += settle(state, expert, doublings, tolerance)
        for rank in range(state.cost.shape[0]):
            total += state.cost[rank]
        if gain <= tolerance * total:
            break


@numba.njit(cache=True, nogil=True)
def expected_balance(state: LayerState) -> float:
    """Mean rank load (which is 1) over the maximum, averaged over the scenarios."""
    balance = 0.0
    for s in range(NUM_SCENARIOS):
        if state.weight[s] > 0.0:
            top = _TINY
            for rank in range(state.load.shape[0]):
                top = max(top, state.load[rank, s])
            balance += state.weight[s] / top
    return balance
