"""What `equipoise` expects of the next window, and how far it trusts that."""

from __future__ import annotations

import math

import numpy as np
import pytest

from equipoise.algorithms.forecast.risk import MAX_EXPONENT, MIN_EXPONENT, exponents
from equipoise.algorithms.forecast.scenarios import _group, make_scenarios, mean_load
from equipoise.algorithms.forecast.window_weights import (
    DECAYS,
    _backtest_error,
    distances,
    is_mixture,
    last_shift,
)
from equipoise.algorithms.rebalance import rebalance_experts
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology


def popularity(seed: int, num_layers: int, num_experts: int) -> np.ndarray:
    share = np.random.default_rng(seed).gamma(0.6, 1.0, size=(num_layers, num_experts)) + 0.01
    return share / share.sum(1, keepdims=True)


def counted(seed: int, num_windows: int, num_layers: int = 4, num_experts: int = 32, tokens: int = 4000) -> np.ndarray:
    """Windows of one steady popularity, with the noise of counting."""
    rng = np.random.default_rng(1000 + seed)
    share = popularity(seed, num_layers, num_experts)
    return rng.poisson(share * tokens, size=(num_windows, num_layers, num_experts)).astype(float)


def drifting(seed: int, num_windows: int, step: float = 0.2) -> np.ndarray:
    """Windows of a popularity that walks at random, by ``step`` of itself a window; nothing is lost in counting."""
    rng = np.random.default_rng(2000 + seed)
    load = [popularity(seed, 4, 32)]
    for _ in range(num_windows - 1):
        load.append(load[-1] * rng.choice([1 - step, 1 + step], size=load[-1].shape))
    return np.array(load)


def test_decay_follows_the_load():
    steady = counted(10, 6)
    assert make_scenarios(steady, 8.0).decay == 1.0
    shifting = np.concatenate([counted(seed, 1) for seed in range(3)]).repeat(2, axis=0)
    assert make_scenarios(shifting, 8.0).decay == 0.02
    assert make_scenarios(steady[:1], 8.0).decay == 1.0


def test_of_two_windows_the_last_counts_more_where_popularity_drifts():
    """Two windows leave nothing to test a decay on: all predict the second from the first."""
    assert make_scenarios(counted(0, 2), 8.0).decay == 1.0
    assert make_scenarios(drifting(0, 2), 8.0).decay == 0.75  # or back and forth: two windows cannot tell


def test_windows_before_a_shift_are_dropped():
    """A backtest cannot see it: nothing is known after the newest window."""
    before, after = counted(12, 3), counted(13, 2)
    newest = make_scenarios(np.concatenate([before, after[:1]]), 8.0)
    assert newest.weight.tolist() == [1, 0, 0, 0]
    assert newest.tokens[..., 0] == pytest.approx(after[0] / after[0].sum(1, keepdims=True) * 8)
    later = make_scenarios(np.concatenate([before, after]), 8.0)
    assert later.weight[2:].tolist() == [0, 0]


def test_windows_before_a_shift_still_tell_how_load_changes():
    before, after = counted(12, 3, tokens=500), counted(13, 1, tokens=500)
    shifted = make_scenarios(np.concatenate([before, after]), 8.0)
    assert (shifted.weight > 0).sum() == 1
    steady = make_scenarios(before, 8.0)
    rates = [s.noise.sum() / mean_load(s.tokens, s.weight).sum() for s in (shifted, steady)]
    # One window has (1 + 1) / (1 + 1/3) times the error that the mean of three has.
    assert rates[0] / rates[1] == pytest.approx(1.5, rel=0.1)


def test_noise_is_the_error_of_the_forecast():
    """Counted tokens: their variance grows with the load. Drift: with its square."""
    load = counted(1, 4, num_layers=60)
    scenarios = make_scenarios(load, 8.0)
    mean = mean_load(scenarios.tokens, scenarios.weight)
    poisson = 8.0 / 4000 * mean * (1 + 1 / 4)
    assert scenarios.steady
    assert 0.9 < scenarios.noise.sum() / poisson.sum() < 1.3  # of counts that are steady it is known
    relative = []
    for step in (0.1, 0.3):
        scenarios = make_scenarios(drifting(1, 4, step), 8.0)
        assert not scenarios.steady
        mean = mean_load(scenarios.tokens, scenarios.weight)
        relative.append(math.sqrt(scenarios.noise.sum() / (mean * mean).sum()))
    assert 0.6 < relative[0] / 0.1 < 1.0
    assert relative[1] / relative[0] == pytest.approx(3, rel=0.15)


def test_scenarios_hold_the_weighted_mean_of_the_windows():
    load = counted(11, 7, 2, 16)
    scenarios = make_scenarios(load, 4.0)
    assert scenarios.weight.sum() == pytest.approx(1)
    assert scenarios.tokens.sum(1)[:, scenarios.weight > 0] == pytest.approx(4.0)
    share = load / load.sum(2, keepdims=True) * 4
    assert scenarios.decay == 1.0
    weight = np.ones(7)
    expected = (share * (weight / weight.sum())[:, None, None]).sum(0)
    assert mean_load(scenarios.tokens, scenarios.weight) == pytest.approx(expected)


def mixed(part: list[float], seed: int = 20, tokens: int = 4000) -> np.ndarray:
    """Windows of which a ``part`` of the tokens is of one task and the rest of another."""
    one, other = (counted(seed + i, len(part), tokens=tokens) for i in range(2))
    return np.stack([p * a + (1 - p) * b for p, a, b in zip(part, one, other, strict=True)])


@pytest.mark.parametrize(
    "part", [[0.4, 0.1, 0.9], [1, 0, 0.9, 0.1], [0.2, 0.9, 0.5, 0.1, 1, 0.3], [1, 1, 0, 1, 1, 0, 0, 0]]
)
def test_windows_that_come_and_go_are_all_worth_as_much(part):
    """The newest one is a draw like the others, even where it is five times farther from its neighbour than they."""
    load = mixed(part)
    scenarios = make_scenarios(load, 8.0)
    assert scenarios.decay >= 0.75
    assert (scenarios.weight > 0).sum() == min(len(part), 4)
    weight = scenarios.decay ** np.arange(len(part) - 1, -1, -1.0)
    expected = (load / load.sum(2, keepdims=True) * 8 * (weight / weight.sum())[:, None, None]).sum(0)
    assert mean_load(scenarios.tokens, scenarios.weight) == pytest.approx(expected)


def test_a_change_of_a_mixture_that_stands_out_is_no_shift():
    assert last_shift(distances(mixed([0.4, 0.1, 0.9]))) == 2


@pytest.mark.parametrize(
    "load",
    [
        pytest.param(drifting(3, 8), id="drift"),
        pytest.param(mixed([1, 1, 1, 1, 0, 0]), id="a shift"),
        pytest.param(counted(30, 2)[[0, 0, 0, 0, 1, 1]], id="nothing but a shift"),
        pytest.param(np.concatenate([counted(seed, 2) for seed in (31, 32, 33)]), id="shift after shift"),
        pytest.param(np.zeros((5, 4, 32)), id="no token"),
    ],
)
def test_windows_that_lead_away_are_no_mixture(load):
    share = load / np.maximum(load.sum(2, keepdims=True), 1.0)
    assert is_mixture(distances(share)) == (not load.any())  # nothing changes: any window is as good


def test_more_windows_than_scenarios_are_grouped_by_likeness():
    """Three kinds of load, of which the rarest came once, and not last: it keeps a scenario of its own."""
    kinds = [popularity(seed, 4, 32) * 1000 for seed in (41, 42, 43)]
    order = [0, 1, 0, 2, 1, 0, 1, 0]
    load = np.stack([kinds[kind] * (1 + 0.01 * i) for i, kind in enumerate(order)])
    scenarios = make_scenarios(load, 8.0)
    assert is_mixture(distances(load / load.sum(2, keepdims=True)))
    for kind in kinds:
        expected = kind / kind.sum(1, keepdims=True) * 8
        fits = [np.allclose(scenarios.tokens[..., s], expected) for s in range(4) if scenarios.weight[s] > 0]
        assert any(fits)
    assert sum(len(group) for group in _group([1 / 8] * 8, distances(load))) == 8


def test_groups_lose_the_least_at_each_join():
    """Against variances computed from the windows themselves."""
    rng = np.random.default_rng(5)
    windows = rng.normal(size=(9, 1, 6))
    weight = (rng.random(9) + 0.1).tolist()
    groups = [[i] for i in range(9)]
    while len(groups) > 4:

        def loss(group: list[int]) -> float:
            w = np.array([weight[i] for i in group])
            points = windows[group, 0]
            return float((w[:, None] * (points - w @ points / w.sum()) ** 2).sum())

        pairs = [(a, b) for a in range(len(groups)) for b in range(a)]
        a, b = min(pairs, key=lambda p: loss(groups[p[0]] + groups[p[1]]) - loss(groups[p[0]]) - loss(groups[p[1]]))
        groups[b] += groups.pop(a)
    found = _group(weight, distances(windows))
    assert sorted(map(sorted, found)) == sorted(map(sorted, groups))


def test_backtest_is_that_of_the_windows():
    """The error from distances alone equals that of predictions made from the windows."""
    windows = np.random.default_rng(6).normal(size=(5, 2, 3))
    for decay in DECAYS:
        error = 0.0
        for t in range(1, 5):
            weight = decay ** np.arange(t - 1.0, -1.0, -1.0)
            weight /= weight.sum()
            error += ((windows[t] - (weight[:, None, None] * windows[:t]).sum(0)) ** 2).sum()
        assert _backtest_error(distances(windows), decay) == pytest.approx(error)


def test_exponent_fits_the_error_of_a_rank_load():
    mean = np.ones((3, 16))  # one expert a rank
    noise = np.array([[0.0], [0.04], [9.0]]) * mean
    found = exponents(mean, noise, num_slots=16, num_ranks=16)
    assert found == pytest.approx([MAX_EXPONENT, math.sqrt(2 * math.log(16)) / 0.2, MIN_EXPONENT], rel=1e-5)
    # Two replicas of each, on ranks of their own: errors of two halves, where there was one of the whole.
    halves = exponents(mean, noise, num_slots=32, num_ranks=16)
    assert halves[1] == pytest.approx(found[1] * math.sqrt(2), rel=1e-5)


def test_weights_lean_less_on_a_forecast_that_is_worth_less():
    """Expert 0 is on both ranks, each with one more: 80% of it on the first would level them."""
    topology = EpTopology(2, 1, 2)
    current = ExpertLocationMetadata.from_physical_to_logical(np.array([[0, 1, 0, 2]]), 3, topology)
    now = np.array([[1000.0, 200.0, 800.0]])

    def first_share(change: float) -> float:
        before = now * np.array([1 - change, 1 - change, 1 + change])
        plan = rebalance_experts(np.array([before, now]), topology, algorithm="reweight", current=current)
        return float(plan.dispatch_weights[0, 0])

    assert first_share(0.01) == pytest.approx(0.8, abs=0.02)
    assert 0.55 < first_share(0.5) < 0.9  # the mean of the two windows would be level with all of it
