"""Makes a placement valid before it is searched: no expert lost, no rank with two replicas of one expert."""

from __future__ import annotations

import numba
import numpy as np

from equipoise.algorithms.layer_state import LayerState, add_share
from equipoise.algorithms.local_search import ON_RANK, overwrite


@numba.njit(cache=True, nogil=True)
def spread_shares(state: LayerState) -> None:
    """Shares that sum to 1 over each expert's live replicas: as they were, uniform where nothing was left."""
    for expert in range(state.first_slot.shape[0]):
        total = 0.0
        slot = state.first_slot[expert]
        while slot >= 0:
            total += state.share[slot]
            slot = state.next_slot[slot]
        slot = state.first_slot[expert]
        while slot >= 0:
            share = state.share[slot] / total if total > 1e-6 else 1.0 / state.num_replicas[expert]
            add_share(state, slot, share - state.share[slot])
            slot = state.next_slot[slot]


@numba.njit(cache=True, nogil=True)
def revive(state: LayerState, home: np.ndarray) -> int:
    """Gives each expert without a live replica the live redundant slot that is missed least; returns the moves.

    ``home`` is the (E,) node an expert has to stay on, or -1. Doubled replicas on one rank go first, then those with
    the least load.
    """
    moves = 0
    size, per_node = state.slots_per_rank, 1
    if state.first_slot.shape[0]:
        per_node = state.cost.shape[0] // max(1, home.max() + 1)
    for expert in range(state.first_slot.shape[0]):
        if state.num_replicas[expert] > 0:
            continue
        best, least = -1, np.inf
        for slot in range(state.expert.shape[0]):
            rank, other = slot // size, state.expert[slot]
            if state.slowness[rank] == 0.0 or state.num_replicas[other] < 2:
                continue
            if home[expert] >= 0 and rank // per_node != home[expert]:
                continue
            missed = -1.0 if state.held[rank, other] > 1 else state.share[slot] * _mean(state, other)
            if missed < least:
                best, least = slot, missed
        if best < 0:
            return -1
        overwrite(state, best, _any_other(state, best), expert)
        add_share(state, best, 1.0)
        moves += 1
    return moves


@numba.njit(cache=True, nogil=True)
def part_twins(state: LayerState, where: np.ndarray, home: np.ndarray, room: int) -> None:
    """Overwrites a second replica on a rank with the expert that has the most load per replica and is not there.

    At most ``room`` slots change. A twin stays where the rank, or its node, has every expert already.
    """
    size, per_node = state.slots_per_rank, state.cost.shape[0] // max(1, home.max() + 1)
    for slot in range(state.expert.shape[0]):
        rank, twin = slot // size, state.expert[slot]
        if state.slowness[rank] == 0.0 or state.held[rank, twin] < 2:
            continue
        best, most = -1, -1.0
        for expert in range(state.first_slot.shape[0]):
            if state.held[rank, expert] > 0 or (home[expert] >= 0 and rank // per_node != home[expert]):
                continue
            if room <= 0 and where[rank, expert] != ON_RANK:
                continue
            per_replica = _mean(state, expert) / (state.num_replicas[expert] + 1)
            if per_replica > most:
                best, most = expert, per_replica
        if best >= 0:
            room -= where[rank, best] != ON_RANK
            overwrite(state, slot, _any_other(state, slot), best)


@numba.njit(cache=True, nogil=True)
def _any_other(state: LayerState, slot: int) -> int:
    other = state.first_slot[state.expert[slot]]
    return state.next_slot[other] if other == slot else other


@numba.njit(cache=True, nogil=True)
def _mean(state: LayerState, expert: int) -> float:
    mean = 0.0
    for s in range(state.weight.shape[0]):
        mean += state.weight[s] * state.tokens[expert, s]
    return mean
