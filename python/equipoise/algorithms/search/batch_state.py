"""Holds one layer's placement and its best split in each scenario, updated change by change.

Splits are flows of tokens (min_max.py), kept from one placement to the next: a search tries hundreds of placements that
differ by one slot, and the flow of each is a few steps away from that of the one before it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from equipoise.algorithms.search.layer_state import COUNT, FIRST, link, relink
from equipoise.algorithms.search.min_max import hottest_rank, level_tokens, reach
from equipoise.jit.compile import helper, int_zeros, zeros

LEVEL = 5e-4  # relative: how far above the least maximum a split may end
LEAST = 1e-6  # of a mean rank's load: fewer tokens than that do not flow


class BatchFlows(NamedTuple):
    """A layer's placement, its best split in each scenario, and room for one more split."""

    expert: np.ndarray  # (P,) int64, logical expert in each slot
    following: np.ndarray  # (P,) int64, next live slot of the same expert, -1: last
    replicas: np.ndarray  # (E, 2) int64: first live slot of an expert, and how many it has
    held: np.ndarray  # (G, E) uint8, replicas of an expert on a rank
    inverse_speed: np.ndarray  # (G,) 0 for a rank that is gone
    tokens: np.ndarray  # (S + 1, P), of each slot; the last row is scratch
    load: np.ndarray  # (S + 1, G), likewise
    closed: np.ndarray  # (S + 1, G) int64, 1 for ranks of the closed set, likewise
    balance: np.ndarray  # (S,) mean over maximum rank load
    order: np.ndarray  # (S,) int64, scenarios from the worst to the best
    room: np.ndarray  # (E, S) most that another replica could gain, as a part of the mean balance
    taking: np.ndarray  # (S, G) likewise, by another replica on a rank
    scratch: np.ndarray  # (3, G) int64


@helper
def new_flows(expert: np.ndarray, loads: np.ndarray, inverse_speed: np.ndarray) -> BatchFlows:
    """The best splits of a placement (P,), which is used, not copied, for the scenarios ``loads`` (E, S)."""
    num_slots, num_ranks = expert.shape[0], inverse_speed.shape[0]
    num_experts, num_scenarios = loads.shape
    flows = BatchFlows(
        expert,
        int_zeros(num_slots),
        np.empty((num_experts, 2), dtype=np.int64),
        np.empty((num_ranks, num_experts), dtype=np.uint8),
        inverse_speed,
        np.empty((num_scenarios + 1, num_slots)),
        np.empty((num_scenarios + 1, num_ranks)),
        np.empty((num_scenarios + 1, num_ranks), dtype=np.int64),
        zeros(num_scenarios),
        int_zeros(num_scenarios),
        np.empty((num_experts, num_scenarios)),
        np.empty((num_scenarios, num_ranks)),
        np.empty((3, num_ranks), dtype=np.int64),
    )
    for e in range(num_experts):
        flows.replicas[e, 0], flows.replicas[e, 1] = -1, 0
        for rank in range(num_ranks):
            flows.held[rank, e] = 0
    for slot in range(num_slots - 1, -1, -1):
        if inverse_speed[slot // (num_slots // num_ranks)] > 0.0:
            link(expert, flows.following, flows.replicas, flows.held, slot, expert[slot])
    for s in range(num_scenarios):
        spread_tokens(flows.following, flows.replicas, loads[:, s], flows.tokens[s], flows.load[s])
        flows.balance[s] = level(flows, s)
        flows.order[s] = s
    return flows


@helper
def spread_tokens(
    following: np.ndarray, replicas: np.ndarray, experts: np.ndarray, tokens: np.ndarray, load: np.ndarray
) -> None:
    """Splits the tokens ``experts`` (E,) alike over live replicas: fills ``tokens`` (P,) and ``load`` (G,)."""
    size = tokens.shape[0] // load.shape[0]
    for rank in range(load.shape[0]):
        load[rank] = 0.0
    for slot in range(tokens.shape[0]):
        tokens[slot] = 0.0
    for e in range(experts.shape[0]):
        slot = replicas[e, FIRST]
        while slot >= 0:
            tokens[slot] = experts[e] / replicas[e, COUNT]
            load[slot // size] += tokens[slot]
            slot = following[slot]


@helper
def coolest_replica(
    following: np.ndarray, replicas: np.ndarray, load: np.ndarray, inverse_speed: np.ndarray, size: int, e: int
) -> int:
    """The slot of an expert whose rank ends first."""
    coolest = replicas[e, FIRST]
    other = following[coolest]
    while other >= 0:
        rank, best = other // size, coolest // size
        if load[rank] * inverse_speed[rank] < load[best] * inverse_speed[best]:
            coolest = other
        other = following[other]
    return coolest


@helper
def level(flows: BatchFlows, row: int) -> float:
    """Levels a row of ``tokens`` and ``load``, finds its closed set; the balance."""
    expert, following, replicas, _, inverse_speed, tokens, load, closed, _, _, _, _, scratch = flows
    arrays = (closed[row], scratch[0], scratch[1], scratch[2])
    level_tokens(expert, following, replicas, inverse_speed, tokens[row], load[row], *arrays, LEVEL, LEAST)
    hottest = hottest_rank(load[row], inverse_speed)
    top = load[row, hottest] * inverse_speed[hottest]
    return 1.0 / top if top > 0.0 else 1.0


@helper
def reach_of(flows: BatchFlows, s: int, start: int, spare: int) -> int:
    """Fills ``scratch[0]`` with the ranks that a rank can hand load to, itself the first; how many."""
    size = flows.expert.shape[0] // flows.inverse_speed.shape[0]
    arrays = (flows.closed[spare], flows.scratch[0], flows.scratch[1], flows.scratch[2])
    return reach(flows.expert, flows.following, flows.replicas, flows.tokens[s], size, start, *arrays, LEAST)


@helper
def level_without(flows: BatchFlows, row: int, slot: int, old: int) -> float:
    """The same once a slot has another expert than ``old``, whose tokens there go to its coolest replica first."""
    tokens, load = flows.tokens[row], flows.load[row]
    size = tokens.shape[0] // load.shape[0]
    if tokens[slot] > 0.0:
        other = coolest_replica(flows.following, flows.replicas, load, flows.inverse_speed, size, old)
        tokens[other] += tokens[slot]
        load[other // size] += tokens[slot]
        load[slot // size] -= tokens[slot]
        tokens[slot] = 0.0
    return level(flows, row)


@helper
def set_expert(flows: BatchFlows, slot: int, e: int) -> int:
    """Replaces a slot's expert in all but the splits; the one before it."""
    old = flows.expert[slot]
    relink(flows.expert, flows.following, flows.replicas, flows.held, slot, e)
    return old


@helper
def sort_scenarios(flows: BatchFlows) -> float:
    """Sorts ``order``; the mean balance."""
    balance, order, total = flows.balance, flows.order, 0.0
    for i in range(order.shape[0]):
        total += balance[i] / order.shape[0]
        j = i
        while j > 0 and balance[order[j - 1]] > balance[order[j]]:
            order[j - 1], order[j] = order[j], order[j - 1]
            j -= 1
    return total
