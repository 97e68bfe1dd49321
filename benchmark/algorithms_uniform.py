"""The uniform variant of the default algorithm, to show what solving weights jointly with the placement is worth.

The same scenarios, soft maximum, candidates, prices and budgets, but an expert's tokens are split evenly over its
replicas, as an engine without dispatch weights would.
"""

from __future__ import annotations

import numba
import numpy as np

from equipoise.algorithms.forecast.scenarios import make_scenarios
from equipoise.algorithms.improve import MIN_GAIN, STAGES
from equipoise.algorithms.search.local_search import MANY_RANKS, WORTH
from equipoise.algorithms.task import NODE_PRICE
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology


def rebalance_uniform(
    load: np.ndarray, topology: EpTopology, current: ExpertLocationMetadata, move_price: float
) -> ExpertLocationMetadata:
    """Plans from ``load`` (T, L, E) and ``current`` with uniform splits."""
    scenarios = make_scenarios(load, float(topology.num_ranks))
    placed = current.physical_to_logical_map.numpy().copy()
    lanes = np.flatnonzero(scenarios.weight > 0)
    for layer in range(len(placed)):
        _search(
            placed[layer],
            np.ascontiguousarray(scenarios.tokens[layer][:, lanes]),
            scenarios.weight[lanes],
            topology.num_ranks,
            topology.ranks_per_node,
            move_price / topology.num_slots,
            NODE_PRICE,
            np.array(STAGES),
        )
    return ExpertLocationMetadata.from_physical_to_logical(placed, load.shape[2], topology)


@numba.njit
def _rank_loads(expert, tokens, num_ranks):
    count = np.zeros(tokens.shape[0])
    for e in expert:
        count[e] += 1
    load = np.zeros((num_ranks, tokens.shape[1]))
    size = len(expert) // num_ranks
    for slot in range(len(expert)):
        load[slot // size] += tokens[expert[slot]] / count[expert[slot]]
    return load, count


@numba.njit
def _cost(load, weight, doublings):
    total = 0.0
    for s in range(len(weight)):
        x = load[s]
        for _ in range(doublings):
            x *= x
        total += weight[s] * x
    return total


@numba.njit
def _search(placed, tokens, weight, num_ranks, ranks_per_node, slot_price, node_price, stages):
    num_slots, num_experts = len(placed), tokens.shape[0]
    size = num_slots // num_ranks
    price_of = np.full((num_ranks, num_experts), node_price)
    for slot in range(num_slots):
        node = slot // size // ranks_per_node
        for rank in range(node * ranks_per_node, (node + 1) * ranks_per_node):
            price_of[rank, placed[slot]] = min(price_of[rank, placed[slot]], 1.0)
    for slot in range(num_slots):
        price_of[slot // size, placed[slot]] = 0.0
    expert, best, value = placed.copy(), placed.copy(), -np.inf
    trial = np.empty((num_ranks, tokens.shape[1]))
    for stage in stages:
        idle, steps = 0, 0
        while True:
            load, count = _rank_loads(expert, tokens, num_ranks)
            spent = 0.0
            for slot in range(num_slots):
                spent += price_of[slot // size, expert[slot]]
            now = -slot_price * spent
            for s in range(len(weight)):
                now += weight[s] / load[:, s].max()
            idle += 1
            if now > value:
                value, idle = now, 0
                best[:] = expert
            cost = np.empty(num_ranks)
            for rank in range(num_ranks):
                cost[rank] = _cost(load[rank], weight, stage)
            least = cost.sum() * min(MANY_RANKS / num_ranks, 1.0) * max(MIN_GAIN, WORTH * slot_price * (1 << stage))
            if idle > 8 or steps >= num_slots:
                break
            steps += 1
            order = np.argsort(-cost, kind="mergesort")
            most, slot_1, slot_2, swap = least, -1, -1, False
            for rank_1 in order[:3]:
                for rank_2 in order[-6:]:
                    if cost[rank_1] <= cost[rank_2]:
                        continue
                    for p in range(rank_1 * size, rank_1 * size + size):
                        a = expert[p]
                        if (expert[rank_2 * size : rank_2 * size + size] == a).any():
                            continue
                        for r in range(rank_2 * size, rank_2 * size + size):
                            b = expert[r]
                            pay = price_of[rank_2, a] - price_of[rank_2, b]
                            if count[b] > 1:
                                trial[:] = load
                                for slot in range(num_slots):
                                    if expert[slot] == a:
                                        trial[slot // size] -= tokens[a] / (count[a] * (count[a] + 1))
                                    elif expert[slot] == b and slot != r:
                                        trial[slot // size] += tokens[b] / (count[b] * (count[b] - 1))
                                trial[rank_2] += tokens[a] / (count[a] + 1) - tokens[b] / count[b]
                                gain = 0.0
                                for rank in range(num_ranks):
                                    gain += cost[rank] - _cost(trial[rank], weight, stage)
                                if gain > most * max(pay, 0.05):
                                    most, slot_1, slot_2, swap = gain / max(pay, 0.05), p, r, False
                            if not (expert[rank_1 * size : rank_1 * size + size] == b).any():
                                pay += price_of[rank_1, b] - price_of[rank_1, a]
                                moved = tokens[a] / count[a] - tokens[b] / count[b]
                                gain = cost[rank_1] + cost[rank_2]
                                gain -= _cost(load[rank_1] - moved, weight, stage)
                                gain -= _cost(load[rank_2] + moved, weight, stage)
                                if gain > most * max(pay, 0.05):
                                    most, slot_1, slot_2, swap = gain / max(pay, 0.05), p, r, True
            if slot_1 < 0:
                break
            if swap:
                expert[slot_1], expert[slot_2] = expert[slot_2], expert[slot_1]
            else:
                expert[slot_2] = expert[slot_1]
    placed[:] = best
