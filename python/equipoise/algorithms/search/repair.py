"""Repairs a placement before it is searched: restores lost experts, splits co-located replicas."""

from __future__ import annotations

import numpy as np

from equipoise.algorithms.search.changes import overwrite
from equipoise.algorithms.search.layer_state import COUNT, FIRST, INVERSE_SPEED, LayerState, add_share
from equipoise.algorithms.search.move_price import ON_RANK
from equipoise.jit.compile import helper, inlined, int_zeros, number


@inlined
def lost_experts(state: LayerState) -> int:
    """Experts without a replica on a live rank."""
    lost = 0
    for e in range(state.replicas.shape[0]):
        if state.replicas[e, COUNT] == 0:
            lost += 1
    return lost


@helper
def home_of_experts(expert: np.ndarray, num_groups: int, num_nodes: int, num_experts: int) -> tuple[np.ndarray, bool]:
    """(E,) node that holds each expert's group, -1 for none; False where groups are asked for but not whole."""
    home = int_zeros(num_experts)
    for e in range(num_experts):
        home[e] = -1
    if num_groups == 0:
        return home, True
    slots_per_node, size = expert.shape[0] // num_nodes, num_experts // num_groups
    whole = True
    for slot in range(expert.shape[0]):
        node, first = slot // slots_per_node, expert[slot] // size * size
        if home[first] >= 0 and home[first] != node:
            whole = False
        for e in range(first, first + size):
            home[e] = node
    if not whole:
        for e in range(num_experts):
            home[e] = -1
    return home, whole


@helper
def spread_shares(state: LayerState) -> None:
    """Shares that sum to 1 over each expert's live replicas: as they were, uniform where nothing was left."""
    expert, following, share, replicas, _, ranks, experts, _ = state
    for e in range(replicas.shape[0]):
        total = 0.0
        slot = replicas[e, FIRST]
        while slot >= 0:
            total += share[slot]
            slot = following[slot]
        slot = replicas[e, FIRST]
        while slot >= 0:
            part = share[slot] / total if total > 1e-6 else 1.0 / replicas[e, COUNT]
            add_share(expert, share, ranks, experts, slot, part - share[slot])
            slot = following[slot]


@helper
def restore_lost_experts(state: LayerState, home: np.ndarray, ranks_per_node: int) -> int:
    """Gives each expert without a live replica the live redundant slot that is missed least; returns the moves, or -1.

    ``home`` is the (E,) node that an expert has to stay on, or -1. Second replicas on one rank go first, then those
    with the least load.
    """
    expert, following, share, replicas, held, ranks, experts, weight = state
    size = expert.shape[0] // ranks.shape[0]
    moves = 0
    for e in range(replicas.shape[0]):
        if replicas[e, COUNT] > 0:
            continue
        best, least = number(-1), np.inf
        for slot in range(expert.shape[0]):
            rank, other = slot // size, expert[slot]
            if ranks[rank, INVERSE_SPEED] == 0.0 or replicas[other, COUNT] < 2:
                continue
            if home[e] >= 0 and rank // ranks_per_node != home[e]:
                continue
            missed = -1.0 if held[rank, other] > 1 else share[slot] * _mean(experts, weight, other)
            if missed < least:
                best, least = slot, missed
        if best < 0:
            return -1
        overwrite(state, best, _another_replica(following, replicas, expert[best], best), e)
        add_share(expert, share, ranks, experts, best, 1.0)
        moves += 1
    return moves


@helper
def split_colocated(state: LayerState, origin: np.ndarray, home: np.ndarray, ranks_per_node: int, room: int) -> None:
    """Overwrites a second replica on a rank with the expert that has the most load per replica and is not there.

    At most ``room`` slots change. A replica stays where its rank, or node, has no use for any other expert.
    """
    expert, following, _, replicas, held, ranks, experts, weight = state
    size = expert.shape[0] // ranks.shape[0]
    for slot in range(expert.shape[0]):
        rank, other = slot // size, expert[slot]
        if ranks[rank, INVERSE_SPEED] == 0.0 or held[rank, other] < 2:
            continue
        best, most = number(-1), -1.0
        for e in range(replicas.shape[0]):
            if held[rank, e] > 0 or (home[e] >= 0 and rank // ranks_per_node != home[e]):
                continue
            if room <= 0 and origin[rank, e] != ON_RANK:
                continue
            per_replica = _mean(experts, weight, e) / (replicas[e, COUNT] + 1)
            if per_replica > most:
                best, most = e, per_replica
        if best >= 0:
            if origin[rank, best] != ON_RANK:
                room -= 1
            overwrite(state, slot, _another_replica(following, replicas, other, slot), best)


@helper
def _another_replica(following: np.ndarray, replicas: np.ndarray, e: int, slot: int) -> int:
    other = replicas[e, FIRST]
    return following[other] if other == slot else other


@helper
def _mean(experts: np.ndarray, weight: np.ndarray, e: int) -> float:
    mean = 0.0
    for s in range(weight.shape[0]):
        mean += weight[s] * experts[e, s]
    return mean
