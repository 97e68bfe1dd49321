"""Packs replicas from scratch, longest processing time first (LPT; Graham, 1969)."""

from __future__ import annotations

import numpy as np

from equipoise.algorithms.search.layer_state import power
from equipoise.jit.compile import helper, inlined, int_zeros, number, zeros
from equipoise.jit.sort import descending

RISK = 0.7  # standard deviations above the mean that an expert is sized for
PEAKS = 3  # doublings of the exponent of the soft maximum over scenarios


@inlined
def risk_load(experts: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(E,) mean plus :data:`RISK` standard deviations over the scenarios of ``LayerState.experts``."""
    load = zeros(experts.shape[0])
    for expert in range(experts.shape[0]):
        mean, square = 0.0, 0.0
        for s in range(weight.shape[0]):
            mean += weight[s] * experts[expert, s]
            square += weight[s] * experts[expert, s] * experts[expert, s]
        load[expert] = mean + RISK * np.sqrt(max(square - mean * mean, 0.0))
    return load


@inlined
def pack_groups(load: np.ndarray, num_groups: int, num_nodes: int) -> np.ndarray:
    """(E,) node of each expert: groups go heaviest first to the lightest node with room."""
    size, room = load.shape[0] // num_groups, num_groups // num_nodes
    group_load = zeros(num_groups)
    for expert in range(load.shape[0]):
        group_load[expert // size] += load[expert]
    node_load, taken = zeros(num_nodes), int_zeros(num_nodes)
    node_of = int_zeros(load.shape[0])
    for group in descending(group_load):
        best = -1
        for node in range(num_nodes):
            if taken[node] < room and (best < 0 or node_load[node] < node_load[best]):
                best = node
        node_load[best] += group_load[group]
        taken[best] += 1
        for expert in range(group * size, (group + 1) * size):
            node_of[expert] = best
    return node_of


@inlined
def count_replicas(load: np.ndarray, num_slots: int, num_ranks: int) -> np.ndarray:
    """(E,) replicas: each further slot goes to the most load per replica, to an expert with fewer than ``num_ranks``.

    Beyond one replica on every rank there is nothing to gain, and two on one rank are waste: more are given only when
    every expert is on every rank already.
    """
    count = int_zeros(load.shape[0])
    for expert in range(load.shape[0]):
        count[expert] = 1
    for _ in range(num_slots - load.shape[0]):
        best = -1
        for expert in range(load.shape[0]):
            if count[expert] < num_ranks and (best < 0 or load[expert] * count[best] > load[best] * count[expert]):
                best = expert
        if best < 0:
            best = 0
            for expert in range(load.shape[0]):
                if count[expert] < count[best]:
                    best = expert
        count[best] += 1
    return count


@helper
def _growth(loads: np.ndarray, rank: int, tokens: np.ndarray, weight: np.ndarray, part: float, slow: float) -> float:
    """What the soft maximum over the scenarios grows by when a rank takes ``part`` of an expert's ``tokens``."""
    growth = 0.0
    for s in range(weight.shape[0]):
        before, after = loads[rank, s] * slow, (loads[rank, s] + part * tokens[s]) * slow
        growth += weight[s] * (power(after, number(PEAKS)) - power(before, number(PEAKS)))
    return growth


@helper
def pack(
    experts: np.ndarray,
    load: np.ndarray,
    tokens: np.ndarray,
    weight: np.ndarray,
    ranks: np.ndarray,
    inverse_speed: np.ndarray,
    slots_per_rank: int,
    flatness: int,
    peaks: bool,
    out: np.ndarray,
) -> None:
    """Packs ``experts`` onto all slots of ``ranks``, no two replicas of one on a rank as long as that is possible.

    Args:
        load: (E,) load of each expert, indexed by its id.
        tokens: (E, NUM_SCENARIOS + 1) its load in each scenario, of the weights ``weight``.
        inverse_speed: (G,) 1 / speed.
        flatness: replicas are counted by load, or by its power .75 (1) or .5 (2). Where all share alike, one replica
            too many for the hottest expert may fit nowhere beside another one's.
        peaks: put each replica where the soft maximum over the scenarios grows least, so that experts which peak
            together come apart; otherwise on the rank with the least load.
        out: (P,) expert of each slot; the slots of ``ranks`` are filled.
    """
    num_slots = ranks.shape[0] * slots_per_rank
    unit = zeros(experts.shape[0])
    for i in range(experts.shape[0]):  # square roots are the same on any machine, powers are not
        root = np.sqrt(load[experts[i]])
        unit[i] = load[experts[i]] if flatness == 0 else np.sqrt(load[experts[i]] * root) if flatness == 1 else root
    count = count_replicas(unit, num_slots, ranks.shape[0])
    for i in range(experts.shape[0]):
        unit[i] = load[experts[i]] / count[i]
    taken, rank_load = int_zeros(ranks.shape[0]), zeros(ranks.shape[0])
    by_scenario = np.empty((ranks.shape[0], weight.shape[0]))
    for r in range(ranks.shape[0]):
        for s in range(weight.shape[0]):
            by_scenario[r, s] = 0.0
    for i in descending(unit):
        e, part = experts[i], 1.0 / count[i]
        for _ in range(count[i]):
            best, least = number(-1), np.inf
            for r in range(ranks.shape[0]):
                if taken[r] == slots_per_rank:
                    continue
                slow = inverse_speed[ranks[r]]
                after = (rank_load[r] + unit[i]) * slow
                if peaks:
                    after = _growth(by_scenario, r, tokens[e], weight, part, slow)
                if after < least and not _holds(out, ranks[r] * slots_per_rank, taken[r], e):
                    best, least = r, after
            if best < 0:
                _deal(experts, count, ranks, slots_per_rank, out)
                return
            out[ranks[best] * slots_per_rank + taken[best]] = e
            taken[best] += 1
            rank_load[best] += unit[i]
            for s in range(weight.shape[0]):
                by_scenario[best, s] += part * tokens[e, s]


@inlined
def worst_loads(placed: np.ndarray, experts: np.ndarray, weight: np.ndarray, inverse_speed: np.ndarray) -> float:
    """Weighted mean over the scenarios of the largest rank load, replicas sharing alike."""
    num_ranks = inverse_speed.shape[0]
    size = placed.shape[0] // num_ranks
    count, total = int_zeros(experts.shape[0]), 0.0
    for slot in range(placed.shape[0]):
        count[placed[slot]] += 1
    for s in range(weight.shape[0]):
        worst = 0.0
        for rank in range(num_ranks):
            tokens = 0.0
            for slot in range(rank * size, (rank + 1) * size):
                tokens += experts[placed[slot], s] / count[placed[slot]]
            worst = max(worst, tokens * inverse_speed[rank])
        total += weight[s] * worst
    return total


@inlined
def _holds(out: np.ndarray, first: int, taken: int, expert: int) -> bool:
    found = False
    for slot in range(first, first + taken):
        found = found or out[slot] == expert
    return found


@inlined
def _deal(experts: np.ndarray, count: np.ndarray, ranks: np.ndarray, slots_per_rank: int, out: np.ndarray) -> None:
    """Deals replicas out in turn: adjacent ones land on distinct ranks, whatever the counts. The search evens out."""
    dealt, most = 0, zeros(count.shape[0])
    for i in range(count.shape[0]):
        most[i] = count[i]
    for i in descending(most):
        for _ in range(count[i]):
            out[ranks[dealt % ranks.shape[0]] * slots_per_rank + dealt // ranks.shape[0]] = experts[i]
            dealt += 1
