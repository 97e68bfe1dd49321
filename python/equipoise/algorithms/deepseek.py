"""`deepseek` and `deepseek_hierarchical`: DeepSeek's published planner (https://github.com/deepseek-ai/EPLB).

The baselines of the field, kept as published: they look at the sum of all windows, plan from nothing, and split an
expert's tokens evenly over its replicas. In each layer (global), or in each node of a layer (hierarchical):

1. hierarchical only: expert groups are packed onto nodes, heaviest first, each to the lightest node with room;
2. every expert gets one slot; the redundant slots go one by one to the expert with the most load per replica;
3. replicas are packed onto ranks, heaviest first, each to the lightest rank with room.

Nothing in step 3 keeps two replicas of an expert apart: where one dominates, both may land on one rank. Arithmetic is
float32 with float64 sums of packed load, as published. Ties go to the lowest index everywhere (the published sort
leaves them to the library), so a plan is the same on any machine.

One departure: where no token was seen, all quotients tie at zero and the published rule hands every redundant slot to
expert 0. Such a layer (hierarchical: such a node's share) is filled round robin instead, slot p with expert p mod E.
"""

from __future__ import annotations

import numpy as np

from equipoise.algorithms.problem import PlacementProblem, Solution
from equipoise.errors import ConfigError
from equipoise.jit.compile import helper, int_zeros, kernel, zeros
from equipoise.jit.sort import descending
from equipoise.jit.threads import for_each_layer


def solve_global(problem: PlacementProblem) -> Solution:
    """The published global planner: experts go anywhere, ``num_groups`` is ignored."""
    return _solve(problem, num_groups=1, num_nodes=1)


def solve_hierarchical(problem: PlacementProblem) -> Solution:
    """The published hierarchical planner: groups of experts stay within a node.

    Without ``num_groups``, as many groups as nodes. Falls back to the global planner, as published, where the groups
    do not divide evenly over the nodes.

    Raises:
        ConfigError: no ``num_groups``, and the experts do not divide evenly over the nodes.
    """
    num_nodes, num_experts = problem.topology.num_nodes, problem.num_logical_experts
    num_groups = problem.num_groups
    if num_groups is None:
        if num_experts % num_nodes:
            raise ConfigError(
                f"deepseek_hierarchical needs num_groups: {num_experts} logical experts do not divide evenly over "
                f"num_nodes={num_nodes}",
                field="num_groups",
            )
        num_groups = num_nodes
    if num_groups % num_nodes:
        return solve_global(problem)
    return _solve(problem, num_groups, num_nodes)


def _solve(problem: PlacementProblem, num_groups: int, num_nodes: int) -> Solution:
    topology = problem.topology
    load = problem.load.sum(0)
    # float32 ends at 1e-38 and 3e38. A power of two changes no comparison.
    _, exponent = np.frexp(load.max(axis=1, keepdims=True))
    load = np.ldexp(load, np.clip(exponent, -32, 64) - exponent).astype(np.float32)
    placed = np.empty((problem.num_layers, topology.num_slots), dtype=np.int64)
    for_each_layer(
        _solve_layers, problem.num_layers, problem.num_threads, load, num_groups, num_nodes, topology.num_ranks, placed
    )
    return Solution(placed)


@helper
def _pack(weights: np.ndarray, num_packs: int, pack_of: np.ndarray, place_in_pack: np.ndarray) -> None:
    """Packs items into equally many per pack: heaviest first, each into the lightest pack with room."""
    num_items = weights.shape[0]
    room = num_items // num_packs
    if room == 1:
        for item in range(num_items):
            pack_of[item] = item
            place_in_pack[item] = 0
        return
    pack_weight, pack_items, order = zeros(num_packs), int_zeros(num_packs), zeros(num_items)
    for item in range(num_items):
        order[item] = weights[item]
    for item in descending(order):
        best = -1
        for pack in range(num_packs):
            if pack_items[pack] < room and (best < 0 or pack_weight[pack] < pack_weight[best]):
                best = pack
        pack_of[item] = best
        place_in_pack[item] = pack_items[best]
        pack_weight[best] += weights[item]
        pack_items[best] += 1


@kernel
def _solve_layers(
    first: int, last: int, load: np.ndarray, num_groups: int, num_nodes: int, num_ranks: int, placed: np.ndarray
) -> None:
    """Fills rows first..last-1 of ``placed`` (L, P) from ``load`` (L, E) float32."""
    num_experts, num_slots = load.shape[1], placed.shape[1]
    group_size, groups_per_node = num_experts // num_groups, num_groups // num_nodes
    experts_per_node, slots_per_node = num_experts // num_nodes, num_slots // num_nodes
    ranks_per_node, slots_per_rank = num_ranks // num_nodes, num_slots // num_ranks
    node_of = int_zeros(num_groups)
    place_of = int_zeros(num_groups)
    rank_of = int_zeros(slots_per_node)
    row_of = int_zeros(slots_per_node)
    experts = int_zeros(num_experts)  # in the order of nodes
    replica = int_zeros(slots_per_node)  # local expert of each replica of a node
    weight = np.empty(slots_per_node, dtype=np.float32)
    for layer in range(first, last):
        group_load = np.empty(num_groups, dtype=np.float32)
        for group in range(num_groups):
            total = 0.0
            for i in range(group_size):
                total += np.float64(load[layer, group * group_size + i])
            group_load[group] = total
        _pack(group_load, num_nodes, node_of, place_of)
        for group in range(num_groups):
            start = (node_of[group] * groups_per_node + place_of[group]) * group_size
            for i in range(group_size):
                experts[start + i] = group * group_size + i
        for node in range(num_nodes):
            mine = experts[node * experts_per_node : (node + 1) * experts_per_node]
            slots = placed[layer, node * slots_per_node : (node + 1) * slots_per_node]
            any_load = False
            for expert in mine:
                any_load = any_load or load[layer, expert] > 0
            if not any_load:
                for slot in range(slots_per_node):
                    slots[slot] = mine[slot % experts_per_node]
                continue
            count = np.empty(experts_per_node, dtype=np.float32)
            for i in range(experts_per_node):
                count[i] = 1
            for i in range(slots_per_node):
                hottest = i
                if i >= experts_per_node:
                    hottest = 0
                    for j in range(1, experts_per_node):
                        if load[layer, mine[j]] / count[j] > load[layer, mine[hottest]] / count[hottest]:
                            hottest = j
                    count[hottest] += np.float32(1)
                replica[i] = hottest
            for i in range(slots_per_node):
                weight[i] = load[layer, mine[replica[i]]] / count[replica[i]]
            _pack(weight, ranks_per_node, rank_of, row_of)
            for i in range(slots_per_node):
                slots[rank_of[i] * slots_per_rank + row_of[i]] = mine[replica[i]]
