"""`equipoise` and `reweight`: optimality of the weights, limits, groups, ranks that differ, prices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment, linprog

from equipoise.algorithms.rebalance import rebalance_experts
from equipoise.errors import ConfigError
from equipoise.placement.balancedness import balancedness, rank_load
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.placement.relabel import match
from equipoise.topology import EpTopology


def skewed(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).gamma(0.6, 300.0, size=shape)


def windows(seed: int, num_windows: int, num_layers: int, num_experts: int, tokens: int = 4000) -> np.ndarray:
    """Windows of one steady popularity, with the noise of counting."""
    rng = np.random.default_rng(seed)
    popularity = rng.gamma(0.6, 1.0, size=(num_layers, num_experts))
    popularity /= popularity.sum(1, keepdims=True)
    return rng.poisson(popularity * tokens, size=(num_windows, num_layers, num_experts)).astype(float)


def random_placement(seed: int, num_experts: int, topology: EpTopology) -> ExpertLocationMetadata:
    rng = np.random.default_rng(seed)
    extra = rng.integers(0, num_experts, topology.num_slots - num_experts)
    return ExpertLocationMetadata.from_physical_to_logical(
        rng.permutation(np.concatenate([np.arange(num_experts), extra]))[None], num_experts, topology
    )


def assert_no_twins(plan: ExpertLocationMetadata) -> None:
    topology = plan.topology
    by_rank = plan.physical_to_logical_map.view(plan.num_layers, topology.num_ranks, topology.slots_per_rank)
    assert by_rank.sort(-1).values.diff(dim=-1).ne(0).all(), by_rank


def least_maximum(load: np.ndarray, plan: ExpertLocationMetadata, capacity: np.ndarray) -> float:
    """The linear program: shares x of the live slots, minimise the largest rank load over its capacity."""
    p2l = plan.physical_to_logical_map[0].numpy()
    size = plan.topology.slots_per_rank
    num_slots, num_ranks = len(p2l), plan.topology.num_ranks
    cost = np.zeros(num_slots + 1)
    cost[-1] = 1
    over = np.zeros((num_ranks, num_slots + 1))
    for slot, expert in enumerate(p2l):
        over[slot // size, slot] = load[expert]
    over[:, -1] = -capacity
    whole = np.zeros((plan.num_logical_experts, num_slots + 1))
    whole[p2l, np.arange(num_slots)] = 1
    live = np.repeat(capacity > 0, size)
    bounds = [(0, None if alive else 0) for alive in live] + [(0, None)]
    solved = linprog(cost, over, np.zeros(num_ranks), whole, np.ones(len(whole)), bounds)
    assert solved.success
    return solved.fun


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_ranks=st.integers(1, 9), size=st.integers(1, 5), uneven=st.booleans())
def test_reweight_reaches_the_least_maximum_of_the_linear_program(seed, num_ranks, size, uneven):
    rng = np.random.default_rng(seed)
    topology = EpTopology(num_ranks, 1, size)
    num_experts = int(rng.integers(1, topology.num_slots + 1))
    load = np.round(rng.gamma(0.5, 300.0, size=(1, num_experts))) + 1.5  # no counts: nothing is known of their noise
    current = random_placement(seed, num_experts, topology)
    capacity = rng.choice([0.5, 1.0, 2.0], num_ranks) if uneven else np.ones(num_ranks)
    plan = rebalance_experts(load, topology, algorithm="reweight", current=current, rank_capacity=capacity)
    reached = (rank_load(load, plan)[0] / capacity).max()
    assert reached == pytest.approx(least_maximum(load[0], current, capacity), rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_windows=st.integers(1, 6))
def test_reweight_moves_nothing_and_never_hurts_what_it_saw(seed, num_windows):
    topology = EpTopology(6, 2, 4)
    load = np.round(skewed(seed, num_windows, 1, 16)) + 1
    current = random_placement(seed, 16, topology)
    plan = rebalance_experts(load, topology, algorithm="reweight", current=current)
    assert torch.equal(plan.physical_to_logical_map, current.physical_to_logical_map)
    if num_windows == 1:
        assert (balancedness(load, plan) >= balancedness(load, current) - 1e-6).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    with_current=st.booleans(),
    num_windows=st.integers(1, 6),
    num_groups=st.sampled_from([None, 4]),
)
def test_no_two_replicas_on_a_rank(seed, with_current, num_windows, num_groups):
    """Also where the placement in force has twins: those of DeepSeek's planner, or of anybody."""
    topology = EpTopology(6, 2, 4)
    current = random_placement(seed, 16, topology) if with_current else None
    plan = rebalance_experts(skewed(seed, num_windows, 1, 16), topology, current=current, num_groups=num_groups)
    assert_no_twins(plan)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), limit=st.integers(0, 12), num_groups=st.sampled_from([None, 4]))
def test_the_limit_on_moves_is_hard(seed, limit, num_groups):
    topology = EpTopology(6, 2, 4)
    current = random_placement(seed, 16, topology)
    plan = rebalance_experts(
        skewed(seed, 2, 1, 16),
        topology,
        current=current,
        max_moves_per_layer=limit,
        move_price=0.0,
        num_groups=num_groups,
    )
    assert current.diff(plan).slots_changed.max() <= limit


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), replan=st.booleans())
def test_groups_stay_whole_on_a_node(seed, replan):
    topology = EpTopology(8, 4, 5)
    load = skewed(seed, 2, 3, 32)
    plan = rebalance_experts(load, topology, num_groups=8)
    if replan:
        plan = rebalance_experts(skewed(seed + 1, 2, 3, 32), topology, num_groups=8, current=plan, move_price=0.01)
    by_node = plan.physical_to_logical_map.view(3, 4, 10) // 4
    for layer in range(3):
        homes = [set(by_node[layer, node].tolist()) for node in range(4)]
        assert all(len(home) == 2 for home in homes)
        assert set().union(*homes) == set(range(8))


def test_groups_are_made_whole_where_the_placement_in_force_splits_them():
    topology = EpTopology(8, 4, 5)
    current = ExpertLocationMetadata.trivial(2, 32, topology)
    plan = rebalance_experts(skewed(0, 2, 2, 32), topology, num_groups=8, current=current)
    by_node = plan.physical_to_logical_map.view(2, 4, 10) // 4
    assert all(len(set(by_node[layer, node].tolist())) == 2 for layer in range(2) for node in range(4))


@pytest.mark.parametrize("algorithm", ["equipoise", "reweight"])
def test_a_rank_that_is_gone_gets_no_tokens(algorithm):
    topology = EpTopology(6, 2, 6)
    load = skewed(1, 3, 2, 16)
    current = rebalance_experts(load, topology)
    capacity = np.array([1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    if algorithm == "reweight":
        lonely = (current.num_replicas == 1).nonzero().tolist()
        gone = {(layer, int(e)) for layer in range(2) for e in current.physical_to_logical_map[layer, 6:12]}
        if any((layer, expert) in gone for layer, expert in lonely):
            with pytest.raises(ConfigError, match="live rank"):
                rebalance_experts(load, topology, algorithm=algorithm, current=current, rank_capacity=capacity)
            return
    plan = rebalance_experts(load, topology, algorithm=algorithm, current=current, rank_capacity=capacity)
    assert plan.dispatch_weights[:, 6:12].eq(0).all()
    live = np.r_[0:6, 12:36]
    for layer in range(2):
        assert set(plan.physical_to_logical_map[layer, live].tolist()) == set(range(16))
    per_rank = rank_load(load, plan)
    assert (per_rank[..., 1] == 0).all()


@pytest.mark.parametrize("with_current", [False, True])
def test_a_rank_of_half_the_speed_gets_half_the_load(with_current):
    topology = EpTopology(4, 1, 6)
    load = windows(0, 1, 3, 16)
    current = ExpertLocationMetadata.trivial(3, 16, topology) if with_current else None
    plan = rebalance_experts(load, topology, current=current, rank_capacity=[1, 0.5, 1, 1], move_price=0.001)
    per_rank = rank_load(load[0], plan)
    assert per_rank[:, 1] / per_rank[:, 0] == pytest.approx([0.5] * 3, rel=0.05)


def test_too_few_live_slots_are_refused():
    with pytest.raises(ConfigError, match="12 slots of the 2 ranks") as caught:
        rebalance_experts(np.ones((1, 16)), EpTopology(4, 1, 6), rank_capacity=[1, 0, 1, 0])
    assert caught.value.field == "rank_capacity"


def test_a_limit_that_cannot_keep_experts_alive_is_refused():
    topology = EpTopology(4, 1, 5)
    current = ExpertLocationMetadata.trivial(1, 14, topology)
    with pytest.raises(ConfigError, match="max_moves_per_layer=0") as caught:
        rebalance_experts(
            np.ones((1, 14)), topology, current=current, rank_capacity=[1, 0, 1, 1], max_moves_per_layer=0
        )
    assert caught.value.field == "rank_capacity"


@pytest.mark.parametrize("capacity", [[1, 1], [1, np.nan, 1, 1], [1, -1, 1, 1], "fast"])
def test_capacity_that_makes_no_sense_is_refused(capacity):
    with pytest.raises(ConfigError) as caught:
        rebalance_experts(np.ones((1, 8)), EpTopology(4, 1, 4), rank_capacity=capacity)
    assert caught.value.field == "rank_capacity"


def test_a_prohibitive_price_moves_nothing_and_a_low_one_balances():
    topology = EpTopology(8, 2, 5)
    load = windows(3, 4, 4, 32)
    current = ExpertLocationMetadata.trivial(4, 32, topology)
    moves, balance = [], []
    for price in (0.0, 0.15, 1000.0):
        plan = rebalance_experts(load, topology, current=current, move_price=price)
        moves.append(int(current.diff(plan).moves.sum()))
        balance.append(float(balancedness(load.sum(0), plan).mean()))
    assert moves[0] > moves[1] > moves[2] == 0
    assert balance[0] >= balance[1] - 0.01
    assert balance[1] > balance[2] + 0.05


def test_nodes_cost_more_to_cross():
    topology = EpTopology(8, 4, 5)
    load = windows(4, 4, 8, 32)
    current = rebalance_experts(windows(5, 4, 8, 32), topology)
    plan = rebalance_experts(load, topology, current=current)
    diff = current.diff(plan)
    assert diff.moves.sum() > 0
    assert diff.cross_node_moves.sum() < 0.75 * diff.moves.sum()  # six of eight ranks are on another node


def test_steady_load_is_left_alone_once_balanced():
    topology = EpTopology(8, 2, 6)
    load = windows(6, 6, 4, 32, tokens=100_000)
    first = rebalance_experts(load[:4], topology)
    second = rebalance_experts(load[1:5], topology, current=first)
    assert first.diff(second).moves.sum() <= 4
    assert float(balancedness(load[5], second).mean()) > 0.95


@pytest.mark.parametrize("seed", range(5))
def test_balances_better_than_the_published_planner(seed):
    topology = EpTopology(8, 2, 5)
    load = skewed(seed, 6, 32)
    ours = balancedness(load, rebalance_experts(load, topology))
    published = balancedness(load, rebalance_experts(load, topology, algorithm="deepseek"))
    assert (ours >= published - 1e-6).all()
    assert ours.mean() > 0.97


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_ranks=st.integers(2, 40), skew=st.sampled_from([0.5, 1.0, 2.0]))
def test_two_slots_on_each_of_as_many_ranks_as_experts_balance_one_window(seed, num_ranks, skew):
    """The optimum is 1: a cold expert whole and a part of a hot one fill a rank (Walker's alias method)."""
    load = np.random.default_rng(seed).lognormal(0.0, skew, (8, num_ranks))
    plan = rebalance_experts(load, EpTopology(num_ranks, 1, 2))
    assert_no_twins(plan)
    assert (balancedness(load, plan) > 0.9).all()
    assert balancedness(load, plan).mean() > 0.96


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_ranks=st.integers(3, 24))
def test_ranks_of_two_slots_that_are_slow_or_gone_keep_every_expert(seed, num_ranks):
    rng = np.random.default_rng(seed)
    capacity = np.append([1.0, 1.0], rng.choice([0.0, 0.5, 1.0, 2.0], num_ranks - 2))
    live = capacity > 0
    load = rng.lognormal(0.0, 1.5, (3, int(rng.integers(2, 2 * live.sum() + 1))))
    plan = rebalance_experts(load, EpTopology(num_ranks, 1, 2), rank_capacity=capacity)
    assert (np.asarray(rank_load(load, plan))[:, ~live] == 0.0).all()
    np.testing.assert_allclose(np.asarray(rank_load(load, plan)).sum(1), load.sum(1), rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.sampled_from([-900, -40, 40, 900]))
def test_scale_of_the_load_does_not_matter(seed, exponent):
    topology = EpTopology(4, 2, 5)
    load = np.round(skewed(seed, 3, 2, 16))
    current = ExpertLocationMetadata.trivial(2, 16, topology)
    plain = rebalance_experts(load, topology, current=current)
    scaled = rebalance_experts(np.ldexp(load, exponent), topology, current=current)
    assert torch.equal(plain.physical_to_logical_map, scaled.physical_to_logical_map)
    assert torch.equal(plain.dispatch_weights, scaled.dispatch_weights)


def test_all_zero_layers_keep_their_placement():
    topology = EpTopology(4, 1, 5)
    load = skewed(7, 2, 3, 16)
    load[:, 1] = 0
    current = random_placement(7, 16, topology)
    current = ExpertLocationMetadata.from_physical_to_logical(
        rebalance_experts(skewed(8, 3, 16), topology).physical_to_logical_map, 16, topology
    )
    plan = rebalance_experts(load, topology, current=current)
    assert plan.physical_to_logical_map[1].tolist() == current.physical_to_logical_map[1].tolist()


def test_an_empty_window_says_nothing():
    topology = EpTopology(4, 1, 5)
    load = windows(9, 3, 2, 16)
    load[1] = 0
    plan = rebalance_experts(load, topology)
    assert float(balancedness(load[0] + load[2], plan).mean()) > 0.9


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
def test_matching_is_optimal(size, seed):
    cost = np.random.default_rng(seed).integers(0, 9, size=(size, size)).astype(float)
    columns = match(cost)
    assert sorted(columns.tolist()) == list(range(size))
    rows, best = linear_sum_assignment(cost)
    assert cost[np.arange(size), columns].sum() == pytest.approx(cost[rows, best].sum())


def test_matching_many_ranks_is_a_permutation():
    cost = np.random.default_rng(0).random((80, 80))
    columns = match(cost)
    assert sorted(columns.tolist()) == list(range(80))
    assert cost[np.arange(80), columns].mean() < 0.25
