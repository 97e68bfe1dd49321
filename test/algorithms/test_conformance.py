"""The conformance suite: every registered placement algorithm passes all of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.algorithms.rebalance import rebalance_experts
from equipoise.algorithms.registry import available_algorithms
from equipoise.errors import ConfigError, LoadError, PlacementError
from equipoise.placement.balancedness import balancedness
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology

ALGORITHMS = ["auto", *available_algorithms()]
# Baselines stay as published: they plan from nothing, and may put two replicas of an expert on one rank.
PUBLISHED = {"deepseek", "deepseek_hierarchical"}
OURS = [name for name in available_algorithms() if name not in PUBLISHED]

every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


def skewed_load(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return np.round(rng.gamma(0.6, 300, size=shape))


@st.composite
def problems(draw):
    num_nodes = draw(st.sampled_from([1, 2, 3]))
    ranks_per_node = draw(st.integers(1, 4))
    experts_per_node = draw(st.integers(1, 12))
    num_ranks = num_nodes * ranks_per_node
    num_experts = num_nodes * experts_per_node
    slots_per_rank = -(-num_experts // num_ranks) + draw(st.integers(0, 3))
    topology = EpTopology(num_ranks, num_nodes, slots_per_rank)
    num_windows, num_layers = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["counts", "sparse", "huge", "tiny"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    load = skewed_load(rng, num_windows, num_layers, num_experts)
    if kind == "sparse":
        load *= rng.random(load.shape) < 0.2
    load = load * {"huge": 1e300, "tiny": 1e-300}.get(kind, 1.0)
    num_groups = draw(st.sampled_from([None, 1, num_nodes, num_experts]))
    return load, topology, num_groups


@every_algorithm
@settings(max_examples=40, deadline=None)
@given(problem=problems(), with_current=st.booleans(), limit=st.sampled_from([None, None, 0, 1, 3]))
def test_any_problem_gives_a_valid_placement(algorithm, problem, with_current, limit):
    load, topology, num_groups = problem
    num_layers, num_experts = load.shape[1:]
    current = ExpertLocationMetadata.trivial(num_layers, num_experts, topology) if with_current else None
    plan = rebalance_experts(
        load, topology, algorithm=algorithm, current=current, num_groups=num_groups, max_moves_per_layer=limit
    )
    assert plan.topology == topology
    assert plan.physical_to_logical_map.shape == (num_layers, topology.num_slots)
    assert plan.num_logical_experts == num_experts
    plan.check_integrity()  # every expert has a slot; maps, counts and weights agree
    if current is not None and limit is not None:
        assert current.diff(plan).slots_changed.max() <= limit


@every_algorithm
def test_same_input_same_placement_for_any_thread_count(algorithm):
    load = skewed_load(np.random.default_rng(0), 3, 9, 32)
    topology = EpTopology(8, 2, 5)
    current = ExpertLocationMetadata.trivial(9, 32, topology)
    plans = [
        rebalance_experts(load, topology, algorithm=algorithm, current=current, num_threads=threads)
        for threads in (1, 1, 2, 3, 8)
    ]
    for plan in plans[1:]:
        assert torch.equal(plan.physical_to_logical_map, plans[0].physical_to_logical_map)
        assert torch.equal(plan.dispatch_weights, plans[0].dispatch_weights)


@every_algorithm
def test_input_is_left_alone(algorithm):
    load = skewed_load(np.random.default_rng(1), 2, 3, 16)
    topology = EpTopology(4, 1, 5)
    current = ExpertLocationMetadata.trivial(3, 16, topology)
    load_before, map_before = load.copy(), current.physical_to_logical_map.clone()
    plan = rebalance_experts(load, topology, algorithm=algorithm, current=current)
    assert np.array_equal(load, load_before)
    assert torch.equal(current.physical_to_logical_map, map_before)
    assert plan.physical_to_logical_map.data_ptr() != current.physical_to_logical_map.data_ptr()


@every_algorithm
def test_renaming_experts_keeps_the_balance(algorithm):
    """Nothing may depend on an expert's number. Ties, where it must, are kept out by the real-valued load."""
    rng = np.random.default_rng(2)
    load = rng.gamma(0.6, 300.0, size=(4, 24))
    topology = EpTopology(6, 1, 5)
    permutation = rng.permutation(24)
    renamed = load[:, permutation]
    current = renamed_current = None
    if algorithm == "reweight":  # keeps the placement it is given
        current = rebalance_experts(load[::-1], topology, algorithm="deepseek")
        renamed_map = np.argsort(permutation)[current.physical_to_logical_map.numpy()]
        renamed_current = ExpertLocationMetadata.from_physical_to_logical(renamed_map, 24, topology)
    plan = rebalance_experts(load, topology, algorithm=algorithm, current=current)
    again = rebalance_experts(renamed, topology, algorithm=algorithm, current=renamed_current)
    before, after = balancedness(load, plan), balancedness(renamed, again)
    assert torch.allclose(before, after, atol=0.02), (before, after)


@every_algorithm
def test_layers_do_not_touch_each_other(algorithm):
    load = skewed_load(np.random.default_rng(3), 5, 16)
    topology = EpTopology(4, 2, 5)
    together = rebalance_experts(load, topology, algorithm=algorithm)
    for layer in range(5):
        alone = rebalance_experts(load[layer : layer + 1], topology, algorithm=algorithm)
        assert torch.equal(alone.physical_to_logical_map[0], together.physical_to_logical_map[layer])


@every_algorithm
@pytest.mark.parametrize("num_groups", [None, 4])
def test_all_zero_load_spreads_the_redundant_slots(algorithm, num_groups):
    """The published rule gives expert 0 all of them."""
    plan = rebalance_experts(np.zeros((2, 16)), EpTopology(8, 2, 3), algorithm=algorithm, num_groups=num_groups)
    assert plan.num_replicas.min() >= 1
    assert plan.num_replicas.max() <= 2
    assert_no_rank_holds_an_expert_twice(plan)


@every_algorithm
def test_one_hot_load_is_split(algorithm):
    load = np.zeros((1, 16))
    load[0, 5] = 1000
    topology = EpTopology(8, 1, 3)
    plan = rebalance_experts(load, topology, algorithm=algorithm)
    if algorithm in OURS and algorithm != "reweight":
        assert balancedness(load, plan).item() >= 0.99
    elif algorithm in PUBLISHED:
        assert plan.num_replicas[0, 5] == 9  # published: one after the other, to the most load per replica


@every_algorithm
def test_one_rank(algorithm):
    plan = rebalance_experts(skewed_load(np.random.default_rng(4), 2, 8), EpTopology(1, 1, 10), algorithm=algorithm)
    plan.check_integrity()
    assert sorted(set(plan.physical_to_logical_map[0].tolist())) == list(range(8))


@every_algorithm
def test_no_redundant_slot(algorithm):
    load = skewed_load(np.random.default_rng(5), 2, 16)
    plan = rebalance_experts(load, EpTopology(4, 1, 4), algorithm=algorithm)
    assert plan.num_replicas.eq(1).all()


@every_algorithm
def test_more_redundant_slots_than_experts(algorithm):
    load = skewed_load(np.random.default_rng(6), 2, 8)
    plan = rebalance_experts(load, EpTopology(4, 1, 6), algorithm=algorithm)
    assert plan.num_replicas.sum(1).eq(24).all()
    plan.check_integrity()


@every_algorithm
def test_one_expert(algorithm):
    plan = rebalance_experts(np.array([[7.0]]), EpTopology(2, 1, 2), algorithm=algorithm)
    assert plan.physical_to_logical_map.eq(0).all()


@every_algorithm
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0])
def test_load_that_is_no_count_is_refused(algorithm, value):
    load = np.ones((2, 8))
    load[1, 3] = value
    with pytest.raises(LoadError, match=r"load.*1, 3"):
        rebalance_experts(load, EpTopology(4, 1, 2), algorithm=algorithm)


@every_algorithm
def test_groups_must_divide_the_experts(algorithm):
    with pytest.raises(ConfigError) as caught:
        rebalance_experts(np.ones((1, 10)), EpTopology(2, 2, 6), algorithm=algorithm, num_groups=4)
    assert caught.value.field == "num_groups"


@every_algorithm
def test_groups_that_do_not_divide_over_nodes_are_no_error(algorithm):
    """As published: such groups cannot be kept whole on nodes, so the planner goes global."""
    rebalance_experts(np.ones((1, 12)), EpTopology(4, 2, 4), algorithm=algorithm, num_groups=3).check_integrity()


@every_algorithm
def test_fewer_slots_than_experts_is_refused(algorithm):
    with pytest.raises(ConfigError, match="do not fit") as caught:
        rebalance_experts(np.ones((1, 9)), EpTopology(4, 1, 2), algorithm=algorithm)
    assert caught.value.field == "slots_per_rank"


@every_algorithm
def test_a_current_placement_of_other_size_is_refused(algorithm):
    current = ExpertLocationMetadata.trivial(1, 8, EpTopology(4, 1, 2))
    with pytest.raises(PlacementError, match="current does not fit"):
        rebalance_experts(np.ones((2, 8)), EpTopology(4, 1, 2), algorithm=algorithm, current=current)


@every_algorithm
def test_tensors_and_lists_are_taken(algorithm):
    load = [[3, 1, 2, 8], [1, 1, 9, 1]]
    topology = EpTopology(2, 1, 3)
    from_list = rebalance_experts(load, topology, algorithm=algorithm)
    from_tensor = rebalance_experts(torch.tensor(load, dtype=torch.int32), topology, algorithm=algorithm)
    assert torch.equal(from_list.physical_to_logical_map, from_tensor.physical_to_logical_map)


def test_unknown_algorithm_lists_the_known_ones():
    with pytest.raises(ConfigError, match="deepseek_hierarchical") as caught:
        rebalance_experts(np.ones((1, 4)), EpTopology(2, 1, 2), algorithm="best")
    assert caught.value.field == "algorithm"


def assert_no_rank_holds_an_expert_twice(plan: ExpertLocationMetadata) -> None:
    topology = plan.topology
    by_rank = plan.physical_to_logical_map.view(plan.num_layers, topology.num_ranks, topology.slots_per_rank)
    assert by_rank.sort(-1).values.diff(dim=-1).ne(0).all(), by_rank


@pytest.mark.parametrize("algorithm", available_algorithms())
@settings(max_examples=30, deadline=None, derandomize=True)  # loads are rounded: one in 2**20 falls on another side
@given(
    seed=st.integers(0, 2**32 - 1),
    exponent=st.floats(-200.0, 200.0),
    num_windows=st.integers(1, 4),
    with_current=st.booleans(),
)
def test_unit_of_the_load_does_not_matter_to_any_algorithm(algorithm, seed, exponent, num_windows, with_current):
    """Tokens a second and shares give one placement; counts, whose noise is known, are another matter."""
    load = np.random.default_rng(seed).gamma(0.6, 300.0, (num_windows, 3, 32))
    topology = EpTopology(8, 2, 5)
    current = ExpertLocationMetadata.trivial(3, 32, topology) if with_current else None
    plan = rebalance_experts(load, topology, algorithm=algorithm, current=current)
    scaled = rebalance_experts(load * 10.0**exponent, topology, algorithm=algorithm, current=current)
    np.testing.assert_array_equal(scaled.physical_to_logical_map, plan.physical_to_logical_map)
    np.testing.assert_array_equal(scaled.dispatch_weights, plan.dispatch_weights)


@every_algorithm
@pytest.mark.parametrize("with_current", [False, True])
def test_whole_numbers_too_large_to_be_counts_plan_as_other_loads_do(algorithm, with_current):
    """A float beyond 2**53 is whole, whatever it stands for."""
    load = np.random.default_rng(8).gamma(0.6, 300.0, (1, 3, 32)) + 1.0
    topology = EpTopology(8, 2, 5)
    current = ExpertLocationMetadata.trivial(3, 32, topology) if with_current else None
    huge = load * 2.0**60
    assert (huge == np.floor(huge)).all()
    assert not (load == np.floor(load)).any()
    plan, scaled = (rebalance_experts(each, topology, algorithm=algorithm, current=current) for each in (load, huge))
    np.testing.assert_array_equal(scaled.physical_to_logical_map, plan.physical_to_logical_map)
    np.testing.assert_array_equal(scaled.dispatch_weights, plan.dispatch_weights)


@pytest.mark.parametrize("algorithm", available_algorithms())
def test_windows_near_the_largest_count_plan_as_smaller_ones_do(algorithm):
    """Their sum is beyond int64."""
    small = np.random.default_rng(6).integers(1, 1 << 12, (4, 2, 16))
    large = small << 50
    topology = EpTopology(4, 2, 5)
    assert int(large.max()) > 1 << 61
    assert sum(int(count) for count in large.flat) > np.iinfo(np.int64).max
    for load, factor in ((large, 1.0), (large.astype(np.float64), 2.0)):
        plan = rebalance_experts(load, topology, algorithm=algorithm)
        scaled = rebalance_experts(load * factor, topology, algorithm=algorithm)
        np.testing.assert_array_equal(scaled.physical_to_logical_map, plan.physical_to_logical_map)
        assert balancedness(load, plan).min() > 0.5
