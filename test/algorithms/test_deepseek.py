"""The published planner: its worked example, and equality with a plain-Python oracle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.algorithms.rebalance import rebalance_experts
from equipoise.topology import EpTopology

README_LOAD = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
README_PLACEMENT = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_worked_example_of_the_published_readme():
    plan = rebalance_experts(README_LOAD, EpTopology(8, 2, 2), algorithm="deepseek_hierarchical", num_groups=4)
    assert plan.physical_to_logical_map.tolist() == README_PLACEMENT


def pack(weights, num_packs):
    """Heaviest first into the lightest pack with room; where each item went, and its place there."""
    room = len(weights) // num_packs
    if room == 1:
        return [(item, 0) for item in range(len(weights))]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    total = [0.0] * num_packs
    where = [(0, 0)] * len(weights)
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        lightest = min((p for p in range(num_packs) if len(packs[p]) < room), key=total.__getitem__)
        where[item] = (lightest, len(packs[lightest]))
        packs[lightest].append(item)
        total[lightest] += float(weights[item])
    return where


def oracle(load, num_slots, num_groups, num_nodes, num_ranks):
    """One layer, straight from the description of the method."""
    load = [np.float32(x) for x in load]
    size = len(load) // num_groups
    groups = pack([np.float32(sum(map(float, load[g * size : (g + 1) * size]))) for g in range(num_groups)], num_nodes)
    placed: list[int] = []
    for node in range(num_nodes):
        mine = [g for g in sorted(range(num_groups), key=lambda g: groups[g][1]) if groups[g][0] == node]
        experts = [g * size + i for g in mine for i in range(size)]
        replicas, count = list(experts), dict.fromkeys(experts, 1)
        while len(replicas) < num_slots // num_nodes:
            hottest = max(experts, key=lambda e: load[e] / np.float32(count[e]))
            replicas.append(hottest)
            count[hottest] += 1
        per_node = num_ranks // num_nodes
        ranks: list[dict[int, int]] = [{} for _ in range(per_node)]
        for item, (rank, place) in enumerate(pack([load[e] / np.float32(count[e]) for e in replicas], per_node)):
            ranks[rank][place] = replicas[item]
        placed += [rank[place] for rank in ranks for place in sorted(rank)]
    return placed


@settings(max_examples=150, deadline=None)
@given(
    num_nodes=st.sampled_from([1, 2, 4]),
    groups_per_node=st.integers(1, 3),
    group_size=st.integers(1, 6),
    ranks_per_node=st.integers(1, 4),
    spare=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
    hierarchical=st.booleans(),
)
def test_equals_the_oracle(num_nodes, groups_per_node, group_size, ranks_per_node, spare, seed, hierarchical):
    num_ranks, num_groups = num_nodes * ranks_per_node, num_nodes * groups_per_node
    num_experts = num_groups * group_size
    topology = EpTopology(num_ranks, num_nodes, -(-num_experts // num_ranks) + spare)
    # Few distinct counts: ties are common, and go to the lowest index in both.
    load = np.random.default_rng(seed).integers(1, 9, size=(2, num_experts))
    if hierarchical:
        plan = rebalance_experts(load, topology, algorithm="deepseek_hierarchical", num_groups=num_groups)
        shape = (topology.num_slots, num_groups, num_nodes, num_ranks)
    else:
        plan = rebalance_experts(load, topology, algorithm="deepseek", num_groups=num_groups)
        shape = (topology.num_slots, 1, 1, num_ranks)
    assert plan.physical_to_logical_map.tolist() == [oracle(row, *shape) for row in load]


def test_windows_are_summed():
    load = np.random.default_rng(0).integers(0, 100, size=(4, 3, 16))
    topology = EpTopology(4, 1, 5)
    plan = rebalance_experts(load, topology, algorithm="deepseek")
    summed = rebalance_experts(load.sum(0), topology, algorithm="deepseek")
    assert plan.physical_to_logical_map.tolist() == summed.physical_to_logical_map.tolist()


@pytest.mark.parametrize("scale", [2.0**-900, 2.0**900])
def test_scale_of_the_load_does_not_matter(scale):
    plan = rebalance_experts(np.array(README_LOAD) * scale, EpTopology(8, 2, 2), algorithm="deepseek")
    plain = rebalance_experts(README_LOAD, EpTopology(8, 2, 2), algorithm="deepseek")
    assert plan.physical_to_logical_map.tolist() == plain.physical_to_logical_map.tolist()


def test_groups_stay_on_one_node():
    load = np.random.default_rng(3).gamma(0.5, 100, size=(6, 32))
    topology = EpTopology(8, 4, 5)
    plan = rebalance_experts(load, topology, algorithm="deepseek_hierarchical", num_groups=8)
    by_node = plan.physical_to_logical_map.view(6, 4, 10)
    for layer in range(6):
        homes = [set((by_node[layer, node] // 4).tolist()) for node in range(4)]
        assert all(len(home) == 2 for home in homes)
        assert set().union(*homes) == set(range(8))


def test_uneven_groups_fall_back_to_the_global_planner_as_published():
    load = np.random.default_rng(4).gamma(0.5, 100, size=(2, 12))
    topology = EpTopology(4, 2, 4)
    hierarchical = rebalance_experts(load, topology, algorithm="deepseek_hierarchical", num_groups=3)
    plain = rebalance_experts(load, topology, algorithm="deepseek")
    assert hierarchical.physical_to_logical_map.tolist() == plain.physical_to_logical_map.tolist()
