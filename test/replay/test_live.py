"""Replay of steps: what the live loop would do, held against small problems whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.config import EplbConfig
from equipoise.dispatch.policy import DispatchPolicy
from equipoise.dispatch.score import StepLoad
from equipoise.errors import ConfigError, EquipoiseError
from equipoise.load.trace import LoadTrace
from equipoise.manager.planning import Migrate, plan_rebalance
from equipoise.placement.balancedness import balancedness, rank_load
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.replay.baselines import forced_even, oracle
from equipoise.replay.costs import GPUS, MODELS, CostModel, ModelShape, model_of
from equipoise.replay.grid import default_intervals, default_redundancies, make_grid
from equipoise.replay.live import LiveSettings, replay_live
from equipoise.replay.pool import ResumeFile, play_all
from equipoise.replay.scoring import StepScorer, force_balanced, make_scorer
from equipoise.replay.sources import SourceSplit
from equipoise.topology import EpTopology

TOPOLOGY = EpTopology(4, 2, 3)
LAYERS, EXPERTS, STEPS = 3, 8, 48
COSTS = CostModel.named("h100", "qwen3-30b")


@pytest.fixture(scope="module")
def trace() -> LoadTrace:
    rng = np.random.default_rng(0)
    popularity = rng.dirichlet(np.full(EXPERTS, 0.5), size=LAYERS)
    return LoadTrace(rng.multinomial(6000, popularity, size=(STEPS, LAYERS)), metadata={"top_k": 2})


# Cost model ----------------------------------------------------------------------------------------------------------


def test_a_rank_takes_the_longer_of_computing_and_reading() -> None:
    """One node of one rank: no token travels, so the seconds are those of the roofline."""
    costs = CostModel(GPUS["h100"], ModelShape(1024, 512, 2.0, 2), efficiency=0.5)
    few = costs.rank_seconds(np.array([[1.0]]), np.array([[4.0]]), 1, 1)
    many = costs.rank_seconds(np.array([[1e6]]), np.array([[4.0]]), 1, 1)
    assert few[0, 0] == pytest.approx(4 * 3 * 1024 * 512 * 2 / (3.35e12 * 0.5))
    assert many[0, 0] == pytest.approx(1e6 * 6 * 1024 * 512 / (989e12 * 0.5))


def test_small_batches_are_judged_on_activated_experts() -> None:
    """Two ranks with as many tokens; one reads twice as many experts and takes twice as long."""
    seconds = COSTS.rank_seconds(np.array([[8.0, 8.0]]), np.array([[4.0, 8.0]]), 1, 2)
    assert seconds[0, 1] / seconds[0, 0] == pytest.approx(2, rel=0.05)


def test_lost_time_is_that_of_the_slowest_rank_beyond_the_mean() -> None:
    seconds, lost = COSTS.step_seconds(np.array([[3e5, 1e5], [2e5, 2e5]]), np.ones((2, 2)), 1, 2)
    even, none = COSTS.step_seconds(np.array([[2e5, 2e5], [2e5, 2e5]]), np.ones((2, 2)), 1, 2)
    assert none == pytest.approx(0)
    assert seconds - even == pytest.approx(lost)


def test_transfers_take_as_long_as_the_busiest_link() -> None:
    table = np.array([[2, 0, 2, 0], [0, 1, 0, 1], [0, 1, 0, 1]])  # rank 0 sends two experts to another node
    size = COSTS.shape.expert_bytes / COSTS.efficiency
    assert COSTS.transfer_seconds(table) == pytest.approx(2 * size / COSTS.gpu.network_bandwidth)


def test_presets_are_named_in_the_error() -> None:
    with pytest.raises(ConfigError, match=r"gpu must be one of .*h100.*got 'h1000'"):
        CostModel.named("h1000", "qwen3-30b")
    assert model_of(256) == "deepseek-v3"
    assert {model_of(n) for n in (8, 60, 130, 300)} <= set(MODELS)


# Scores --------------------------------------------------------------------------------------------------------------


def random_placement(seed: int) -> ExpertLocationMetadata:
    rng = np.random.default_rng(seed)
    rows = rng.permuted(np.tile(np.arange(12) % EXPERTS, (LAYERS, 1)), axis=1)
    return ExpertLocationMetadata.from_physical_to_logical(rows, EXPERTS, TOPOLOGY)


def mean_load(scorer, counts: np.ndarray, steps: int) -> StepLoad:
    loads = [scorer.step(counts, index) for index in range(steps)]
    return StepLoad(np.mean([each.tokens for each in loads], 0), np.mean([each.activated for each in loads], 0))


def test_without_replicas_nothing_is_drawn(trace: LoadTrace) -> None:
    alone = ExpertLocationMetadata.trivial(LAYERS, EXPERTS, EpTopology(4, 2, 2))
    counts = trace.logical_count[0]
    for dispatch in ("even", "weights"):
        load = make_scorer(alone, dispatch, SourceSplit(trace, 4, 2), DispatchPolicy("batch")).step(counts, 0)
        np.testing.assert_allclose(load.balancedness(), balancedness(counts, alone).numpy())


@pytest.mark.parametrize("dispatch", ["even", "weights"])
def test_drawn_tokens_are_as_the_shares_say_on_average(trace: LoadTrace, dispatch: str) -> None:
    placed = random_placement(1)
    counts = trace.logical_count[0]
    still = LoadTrace(np.tile(counts, (60, 1, 1)), metadata=trace.metadata)
    scorer = make_scorer(placed, dispatch, SourceSplit(still, 4), DispatchPolicy("batch"))
    load = mean_load(scorer, counts, 60)
    np.testing.assert_allclose(load.tokens, rank_load(counts, placed), rtol=0.02)
    assert load.tokens.sum() == pytest.approx(counts.sum())


def test_activated_experts_are_what_random_dispatch_activates() -> None:
    placed = random_placement(2)
    counts = np.random.default_rng(0).integers(0, 4, (LAYERS, EXPERTS))
    found = mean_load(StepScorer(placed, "even"), counts, 4000).activated
    rng, seen = np.random.default_rng(1), np.zeros((LAYERS, 4))
    for _ in range(4000):
        for layer in range(LAYERS):
            hit = np.zeros(12, dtype=bool)
            for expert in np.repeat(np.arange(EXPERTS), counts[layer]):
                hit[rng.choice(np.flatnonzero(placed.physical_to_logical_map[layer].numpy() == expert))] = True
            seen[layer] += hit.reshape(4, 3).sum(1)
    np.testing.assert_allclose(seen / 4000, found, atol=0.05)


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_dealt_tokens_hold_the_counts_and_name_no_expert_twice(seed: int, top_k: int, num_tokens: int) -> None:
    rng = np.random.default_rng(seed)
    chosen = np.argsort(rng.random((num_tokens, LAYERS, EXPERTS)), axis=2)[:, :, :top_k]
    counts = np.stack([np.bincount(chosen[:, layer].ravel(), minlength=EXPERTS) for layer in range(LAYERS)])
    sources = SourceSplit(LoadTrace(counts[None], metadata={"top_k": top_k}), 4)
    tokens = sources.tokens(0)
    assert tokens.shape == (LAYERS, num_tokens, top_k)
    found = [np.bincount(layer.ravel(), minlength=EXPERTS) for layer in tokens]
    np.testing.assert_array_equal(found, counts)
    per_rank = sources.step(0)
    np.testing.assert_array_equal(per_rank.sum(0), counts)
    assert np.ptp(per_rank.sum((1, 2)) // (LAYERS * top_k)) <= 1, "ranks hold as many tokens"


@pytest.mark.parametrize("dispatch", ["even", "static", "weights", "batch"])
def test_no_kind_of_dispatch_loses_a_token(trace: LoadTrace, dispatch: str) -> None:
    scorer = make_scorer(random_placement(3), dispatch, SourceSplit(trace, 4), DispatchPolicy("batch"))
    assert scorer.step(trace.logical_count[5], 5).tokens.sum() == pytest.approx(trace.logical_count[5].sum())


@pytest.mark.parametrize("dispatch", ["even", "static", "weights", "batch"])
def test_no_kind_of_dispatch_loses_a_token_of_a_token_trace(dispatch: str) -> None:
    """A trace holds ids tokens first, scorers look at them layer by layer."""
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permuted(np.arange(EXPERTS))[:2] for _ in range(40 * LAYERS)]).reshape(40, LAYERS, 2)
    counts = np.stack([np.bincount(ids[:, layer].ravel(), minlength=EXPERTS) for layer in range(LAYERS)])
    trace = LoadTrace(counts[None], topk_ids=ids, token_offsets=np.array([0, 40]))
    scorer = make_scorer(random_placement(3), dispatch, SourceSplit(trace, 4), DispatchPolicy("batch"))
    assert scorer.step(counts, 0).tokens.sum(1).tolist() == [80.0] * LAYERS


def test_sources_are_recorded_ranks_then_tokens_then_a_fixed_split() -> None:
    apart = np.random.default_rng(0).integers(0, 9, (2, 4, LAYERS, EXPERTS))
    recorded = LoadTrace(apart.sum(1), rank_count=apart)
    np.testing.assert_array_equal(SourceSplit(recorded, 4).step(1), apart[1])
    ids = np.arange(16).reshape(8, 1, 2) % 4
    tokens = LoadTrace(np.full((2, 1, 4), 2), topk_ids=ids, token_offsets=np.array([0, 4, 8]))
    assert SourceSplit(tokens, 2).step(1).sum(0).tolist() == [[2, 2, 2, 2]]
    sums = SourceSplit(LoadTrace(apart.sum(1)), 8)
    np.testing.assert_array_equal(sums.step(0), sums.step(0))
    np.testing.assert_array_equal(sums.step(0).sum(0), apart[0].sum(0))


# The loop ------------------------------------------------------------------------------------------------------------


def test_nothing_stays_where_it_is(trace: LoadTrace) -> None:
    result = replay_live(trace, TOPOLOGY, LiveSettings(None), COSTS)
    trivial = ExpertLocationMetadata.trivial(LAYERS, EXPERTS, TOPOLOGY)
    np.testing.assert_allclose(result.balancedness, balancedness(trace.logical_count, trivial).numpy(), atol=0.03)
    assert (result.plans, result.bytes_moved) == ((), 0)


def test_the_first_plan_is_the_managers_own_from_the_same_windows(trace: LoadTrace) -> None:
    settings = LiveSettings("equipoise", interval=16, layers_per_chunk=100)
    result = replay_live(trace.take(slice(0, 30)), TOPOLOGY, settings, COSTS)
    trivial = ExpertLocationMetadata.trivial(LAYERS, EXPERTS, TOPOLOGY)
    windows = trace.logical_count[:16].reshape(8, 2, LAYERS, EXPERTS).sum(1)
    plan = plan_rebalance(
        windows, trivial, EplbConfig(), algorithm="equipoise", request=None, window_steps=16, num_groups=None,
        max_staged_experts=4, clock=lambda: 0.0,
    )  # fmt: skip
    assert isinstance(plan, Migrate)
    np.testing.assert_array_equal(result.final_placement.physical_to_logical_map.numpy(), plan.physical_to_logical_map)
    assert result.plans[0].experts_moved == int(plan.diff.moves.sum())
    assert result.plans[0].bytes_moved == plan.diff.moves.sum() * COSTS.shape.expert_bytes


def test_a_plan_takes_effect_after_its_delay_and_layer_by_layer(trace: LoadTrace) -> None:
    fast = CostModel.named("h100", "qwen3-30b", network_bandwidth=1e18)
    settings = LiveSettings("equipoise", interval=16, planning_delay=5, layers_per_chunk=1)
    result = replay_live(trace, TOPOLOGY, settings, fast)
    still = replay_live(trace, TOPOLOGY, LiveSettings(None), fast)
    same = np.isclose(result.balancedness, still.balancedness).all(1)
    assert same[: 16 + 5].all(), "nothing may change before the plan is there"
    assert result.plans[0].step == 16 + 5
    changed = [int((~np.isclose(result.balancedness[t], still.balancedness[t])).sum()) for t in range(21, 26)]
    assert changed == sorted(changed)
    assert changed[0] <= 1, "one layer a step"


def test_slow_links_make_a_migration_arrive_later(trace: LoadTrace) -> None:
    slow = CostModel.named("h100", "qwen3-30b", network_bandwidth=1e6, node_bandwidth=1e6)
    settings = LiveSettings("equipoise", interval=8)
    few = LoadTrace(trace.logical_count // 100, metadata=trace.metadata)  # an expert weighs as much as many tokens
    late, soon = (replay_live(few, TOPOLOGY, settings, costs) for costs in (slow, COSTS))
    assert late.mean_balancedness < soon.mean_balancedness - 0.01


def test_order_of_the_baselines(trace: LoadTrace) -> None:
    nothing = replay_live(trace, TOPOLOGY, LiveSettings(None), COSTS)
    ours = replay_live(trace, TOPOLOGY, LiveSettings("equipoise", interval=8), COSTS)
    best = oracle(trace, TOPOLOGY, COSTS, interval=8, dispatch="weights")
    even = forced_even(trace, TOPOLOGY, COSTS)
    assert nothing.mean_balancedness < ours.mean_balancedness < best.mean_balancedness < even.mean_balancedness == 1
    assert even.tokens_per_second > best.tokens_per_second
    assert even.lost_seconds.sum() == pytest.approx(0, abs=1e-12)
    assert "balancedness" in repr(ours)


def test_force_balanced_spreads_tokens_and_activated_experts() -> None:
    load = force_balanced(np.array([[4, 0, 8, 0]]), 2, 4)
    assert load.tokens.tolist() == [[6, 6]]
    assert load.activated.tolist() == [[1, 1]]


def test_idle_steps_are_left_out(trace: LoadTrace) -> None:
    counts = np.array(trace.logical_count)
    counts[3:9] = 0
    assert len(replay_live(LoadTrace(counts), TOPOLOGY, LiveSettings(None), COSTS).balancedness) == STEPS - 6


# The grid ------------------------------------------------------------------------------------------------------------


def grid(**more):
    options = {"algorithms": ("equipoise",), "redundancies": (0, 4), "intervals": (8,), "base": LiveSettings(None)}
    options["dispatches"] = ("even", "weights")
    return make_grid(EXPERTS, 4, 2, **{**options, **more})


def test_a_grid_is_played_side_by_side_and_resumed(trace: LoadTrace, tmp_path) -> None:
    candidates = grid()
    played = play_all(candidates, trace, COSTS, jobs=2, resume=ResumeFile(tmp_path / "kept"))
    assert [entry.row["kind"] for entry in played] == [candidate.kind for candidate in candidates]
    lines = (tmp_path / "kept").read_text().splitlines()
    assert len(lines) == len(candidates)
    (tmp_path / "kept").write_text("\n".join(lines[:3]) + "\n" + lines[3][:50])  # killed while writing
    seen = []
    again = play_all(
        candidates, trace, COSTS, jobs=1, resume=ResumeFile(tmp_path / "kept"), on_row=lambda: seen.append(1)
    )
    for left, right in zip(played, again, strict=True):
        assert left.row["balancedness_per_step"] == right.row["balancedness_per_step"]
    assert len(seen) == len(candidates)


def test_an_algorithm_that_cannot_plan_is_left_out_with_a_word(trace: LoadTrace) -> None:
    candidates = grid(algorithms=("no_such_algorithm",), redundancies=(0,))
    played = play_all(candidates, trace, COSTS, jobs=1)
    left_out = [entry.left_out for entry in played if entry.row is None]
    assert len(left_out) == 1
    assert "no_such_algorithm" in left_out[0]


def test_a_plan_that_fails_is_not_a_row_without_a_word(trace: LoadTrace) -> None:
    with pytest.raises((EquipoiseError, ConfigError)):
        replay_live(trace, TOPOLOGY, LiveSettings("no_such_algorithm", interval=8), COSTS)


def test_defaults_fit_the_ranks_and_the_trace() -> None:
    assert default_redundancies(256, 32) == [0, 32, 64]
    assert default_redundancies(256, 96) == [32, 128, 224]
    with pytest.raises(ConfigError, match="at least 32"):
        default_redundancies(256, 96, 10)
    assert default_intervals(1000) == [32, 64, 128]
    assert default_intervals(3) == [1]
