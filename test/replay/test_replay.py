"""Replay: what a policy may see, how it is scored, and what its plans are said to cost."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.algorithms.rebalance import rebalance_experts
from equipoise.errors import ConfigError, EquipoiseError, TraceError
from equipoise.load.trace import LoadTrace
from equipoise.load.windows import cut_windows
from equipoise.placement.balancedness import balancedness
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.replay.report import legend
from equipoise.replay.simulate import replay, score_baselines
from equipoise.topology import EpTopology

TOPOLOGY = EpTopology(4, 2, 3)  # 12 slots for 8 experts
LAYERS, EXPERTS = 3, 8


def random_trace(num_steps: int, seed: int = 0) -> LoadTrace:
    rng = np.random.default_rng(seed)
    popularity = rng.dirichlet(np.full(EXPERTS, 0.5), size=LAYERS)
    return LoadTrace(rng.multinomial(600, popularity, size=(num_steps, LAYERS)))


class Spy:
    """A policy that keeps what it was shown and answers with given placements."""

    name = "spy"

    def __init__(self, answers=None) -> None:
        self.histories: list[np.ndarray] = []
        self.currents: list[ExpertLocationMetadata] = []
        self.answers = answers

    def plan(self, history, current):
        self.histories.append(history.copy())
        self.currents.append(current)
        return current if self.answers is None else next(self.answers)


def shuffled(seed: int) -> ExpertLocationMetadata:
    rng = np.random.default_rng(seed)
    rows = np.tile(np.arange(TOPOLOGY.num_slots) % EXPERTS, (LAYERS, 1))
    return ExpertLocationMetadata.from_physical_to_logical(rng.permuted(rows, axis=1), EXPERTS, TOPOLOGY)


# ------------------------------------------------------------------ windows


def test_windows_are_sums_of_whole_windows_of_one_trace():
    first, second = random_trace(7, 1), random_trace(5, 2)
    windows = cut_windows([first, second], 3)
    expected = [
        first.logical_count[0:3].sum(0),
        first.logical_count[3:6].sum(0),
        second.logical_count[0:3].sum(0),
    ]
    np.testing.assert_array_equal(windows.load, expected)
    assert windows.trace_index == (0, 0, 1)
    assert windows.first_step == (0, 3, 0)
    assert windows.steps_left_out == 1 + 2


def test_windows_without_a_token_are_skipped_and_counted():
    counts = random_trace(8).logical_count.copy()
    counts[2:4] = 0
    windows = cut_windows([LoadTrace(counts)], 2)
    assert (len(windows), windows.empty_windows, windows.first_step) == (3, 1, (0, 4, 6))


@pytest.mark.parametrize("num_steps", [0, 3, 7])
def test_fewer_than_two_windows_are_an_error(num_steps):
    with pytest.raises(TraceError, match=rf"at least two windows.*window=4 .*\[{num_steps}\] steps"):
        cut_windows([random_trace(num_steps)], 4)


def test_traces_of_different_models_are_an_error():
    other = LoadTrace(np.ones((8, LAYERS, EXPERTS + 1), dtype=int))
    with pytest.raises(TraceError, match=r"\(3, 8\), trace 1 has \(3, 9\)"):
        cut_windows([random_trace(8), other], 2)


# ------------------------------------------------------------------ what a policy sees


def test_an_algorithm_sees_as_many_windows_as_suit_it():
    """The published planners add up what they get: more than one window would make them worse than they are."""
    trace = random_trace(24)
    seen = {name: replay(trace, TOPOLOGY, name, window=2, oracle_algorithms=()) for name in ("deepseek", "equipoise")}
    assert {name: result.history for name, result in seen.items()} == {"deepseek": 1, "equipoise": 8}
    words = legend(list(seen.values()))
    assert "each from 8 past windows at most (equipoise), 1 past window at most (deepseek)." in words
    assert "each from 8 past windows at most." in legend([seen["equipoise"]])
    told = replay(trace, TOPOLOGY, "deepseek", window=2, history=3, oracle_algorithms=())
    assert told.history == 3


@settings(max_examples=40, deadline=None)
@given(history=st.integers(1, 4), every=st.integers(1, 4), num_windows=st.integers(2, 9))
def test_a_policy_sees_the_windows_before_and_nothing_else(history, every, num_windows):
    trace = random_trace(2 * num_windows)
    load = cut_windows([trace], 2).load
    spy = Spy()
    result = replay(trace, TOPOLOGY, spy, window=2, history=history, rebalance_every=every, oracle_algorithms=())
    planned_at = list(range(1, num_windows, every))
    assert [plan.window for plan in result.plans] == planned_at
    for index, seen in zip(planned_at, spy.histories, strict=True):
        np.testing.assert_array_equal(seen, load[max(0, index - history) : index])


def test_a_policy_cannot_change_what_it_is_scored_on():
    class Vandal(Spy):
        def plan(self, history, current):
            history[...] = 1
            return current

    with pytest.raises(EquipoiseError, match="'spy' failed before window 1: ValueError.*read-only"):
        replay(random_trace(8), TOPOLOGY, Vandal(), window=2, oracle_algorithms=())


def test_a_plan_takes_effect_until_the_next():
    trace, plans = random_trace(10), [shuffled(1), shuffled(2)]
    spy = Spy(iter(plans))
    result = replay(trace, TOPOLOGY, spy, window=2, rebalance_every=2, oracle_algorithms=())
    load = cut_windows([trace], 2).load
    for row, (window, placement) in enumerate([(1, plans[0]), (2, plans[0]), (3, plans[1]), (4, plans[1])]):
        np.testing.assert_array_equal(result.balancedness[row], balancedness(load[window], placement).numpy())
    start = ExpertLocationMetadata.trivial(LAYERS, EXPERTS, TOPOLOGY)
    assert torch.equal(spy.currents[0].physical_to_logical_map, start.physical_to_logical_map)
    assert spy.currents[1] is plans[0]
    assert result.final_placement is plans[1]
    np.testing.assert_array_equal(result.no_rebalancing, balancedness(load[1:], start).numpy())


# ------------------------------------------------------------------ costs and scores


def test_costs_are_those_of_the_plans():
    plans = [shuffled(1), shuffled(2), shuffled(2)]
    ticks = iter([0.0, 1.0, 10.0, 13.0, 20.0, 22.0])
    result = replay(
        random_trace(8),
        TOPOLOGY,
        Spy(iter(plans)),
        window=2,
        expert_bytes=1000,
        initial=shuffled(0),
        oracle_algorithms=(),
        clock=lambda: next(ticks),
    )
    moves = crossings = changed = 0
    for old, new in zip([shuffled(0), *plans], plans, strict=False):
        for layer in range(LAYERS):
            before, after = old.physical_to_logical_map[layer].tolist(), new.physical_to_logical_map[layer].tolist()
            for slot in range(TOPOLOGY.num_slots):
                changed += before[slot] != after[slot]
                moves += after[slot] not in before[slot // 3 * 3 : slot // 3 * 3 + 3]
                crossings += after[slot] not in before[slot // 6 * 6 : slot // 6 * 6 + 6]
    assert (result.slots_changed, result.moves, result.cross_node_moves) == (changed, moves, crossings)
    assert moves > crossings > 0
    assert (result.bytes_moved, result.cross_node_bytes) == (1000 * moves, 1000 * crossings)
    assert (result.planning_seconds_median, result.planning_seconds_max) == (2.0, 3.0)
    assert result.plans[2].slots_changed == result.plans[2].layers_changed == 0


def test_bytes_are_unknown_without_the_size_of_an_expert():
    result = replay(random_trace(4), TOPOLOGY, Spy(), window=2, oracle_algorithms=())
    assert result.bytes_moved is None
    assert result.moves == 0


def test_layers_without_tokens_stay_out_of_averages():
    counts = random_trace(6).logical_count.copy()
    counts[:, 1] = 0
    result = replay(LoadTrace(counts), TOPOLOGY, "deepseek", window=2)
    assert np.isnan(result.balancedness[:, 1]).all()
    assert np.isnan(result.oracle[:, 1]).all()
    seen = result.balancedness[:, [0, 2]]
    assert result.mean_balancedness == pytest.approx(seen.mean())
    assert result.worst_window == pytest.approx(seen.mean(1).min())
    assert 0 < result.mean_balancedness <= result.mean_oracle <= 1


def test_the_oracle_is_the_best_same_window_plan_of_its_algorithms():
    windows = cut_windows([random_trace(8)], 2)
    names = ("deepseek", "deepseek_hierarchical")
    baselines = score_baselines(windows, TOPOLOGY, oracle_algorithms=names)
    for row, load in enumerate(windows.load[1:]):
        scores = [balancedness(load, rebalance_experts(load, TOPOLOGY, algorithm=name)).numpy() for name in names]
        np.testing.assert_array_equal(baselines.oracle[row], np.maximum(*scores))
    assert baselines.oracle_algorithms == names


def test_steady_load_is_balanced_as_well_as_with_the_future_in_hand():
    one = random_trace(1).logical_count
    steady = LoadTrace(np.repeat(one, 8, axis=0))
    result = replay(steady, TOPOLOGY, "deepseek", window=2, oracle_algorithms=["deepseek"])
    np.testing.assert_array_equal(result.balancedness, result.oracle)
    assert result.gap_closed == pytest.approx(1.0)
    assert result.mean_no_rebalancing < result.mean_balancedness
    assert result.plans[0].slots_changed > 0
    assert [plan.slots_changed for plan in result.plans[1:]] == [0, 0]


def test_the_same_replay_gives_the_same_numbers():
    first, second = (replay(random_trace(12), TOPOLOGY, "deepseek", window=2) for _ in range(2))
    np.testing.assert_array_equal(first.balancedness, second.balancedness)
    assert first.moves == second.moves


def test_a_limit_on_moves_is_kept_in_every_plan():
    result = replay(random_trace(12), TOPOLOGY, "deepseek", window=2, max_moves_per_layer=0)
    assert all(plan.most_slots_changed_in_a_layer == 0 for plan in result.plans)
    np.testing.assert_array_equal(result.balancedness, result.no_rebalancing)


# ------------------------------------------------------------------ errors


def test_a_failing_policy_is_named_with_the_window():
    class Broken(Spy):
        def plan(self, history, current):
            if len(self.histories) == 1:
                raise IndexError("list index\nout of range")
            return super().plan(history, current)

    with pytest.raises(EquipoiseError, match="'spy' failed before window 2: IndexError: list index out of range"):
        replay(random_trace(8), TOPOLOGY, Broken(), window=2, oracle_algorithms=())


def test_a_plan_for_another_topology_is_an_error():
    other = ExpertLocationMetadata.trivial(LAYERS, EXPERTS, EpTopology(2, 2, 6))
    with pytest.raises(EquipoiseError, match="'spy' planned for .*num_ranks=2.* asked for .*num_ranks=4"):
        replay(random_trace(8), TOPOLOGY, Spy(iter([other])), window=2, oracle_algorithms=())


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"window": 0}, "window"),
        ({"history": 0}, "history"),
        ({"rebalance_every": -1}, "rebalance_every"),
        ({"expert_bytes": 0}, "expert_bytes"),
        ({"policy": "nonsense"}, "algorithm"),
        ({"oracle_algorithms": ["nonsense"]}, "algorithm"),
        ({"topology": EpTopology(7, 1, 1)}, "slots_per_rank"),
    ],
)
def test_wrong_arguments_name_the_field(options, field):
    arguments = {"trace": random_trace(8), "topology": TOPOLOGY, "policy": "deepseek", "window": 2, **options}
    with pytest.raises(ConfigError) as caught:
        replay(**arguments)
    assert caught.value.field == field
