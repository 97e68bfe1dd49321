"""Kinds of load that come back are told from bursts that pass, and plans serve all of those kinds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.algorithms.forecast.scenarios import make_scenarios
from equipoise.algorithms.forecast.window_weights import bursts_of, distances, recurring
from equipoise.algorithms.rebalance import rebalance_experts
from equipoise.placement.balancedness import balancedness
from equipoise.topology import EpTopology

KINDS = np.random.default_rng(0).gamma(0.6, 1.0, (6, 1, 64))
KINDS /= KINDS.sum(2, keepdims=True)


def windows_of(kinds: list[int]) -> np.ndarray:
    return np.random.default_rng(len(kinds)).poisson(KINDS[kinds] * 50_000).astype(float)


def told(kinds: list[int]) -> tuple[list[int], list[int]]:
    distance = distances(windows_of(kinds) / 50_000)
    return bursts_of(distance), recurring(distance)


@given(where=st.integers(1, 6))
def test_a_burst_that_passed_is_no_scenario(where: int) -> None:
    kinds = [0] * 8
    kinds[where] = 1
    assert told(kinds)[0] == [where]
    with_burst, without = (make_scenarios(windows_of(k), 64.0) for k in (kinds, [0] * 7))
    assert np.abs(with_burst.tokens[..., 0] - without.tokens[..., 0]).max() < 0.5


def test_after_one_burst_the_newest_window_may_be_another() -> None:
    assert told([0, 0, 1, 0, 0, 2])[0] == [2, 5]
    assert told([0, 0, 0, 0, 0, 2])[0] == []  # the first that is seen: a shift


def test_kinds_that_come_back_are_no_bursts() -> None:
    bursts, order = told([0, 1, 0, 1, 0, 1])
    assert bursts == []
    assert [window % 2 for window in order] == [1, 1, 1, 0, 0, 0]
    assert told([0, 0, 1, 0, 0, 1])[0] == []
    assert told([0, 1, 2, 3, 4, 5])[1] == []


def test_there_and_back_is_enough_to_expect_both_kinds() -> None:
    assert told([0, 1, 0])[1] == [2, 0, 1]
    assert told([0, 1, 2])[1] == told([0, 1, 1])[1] == told([0, 0, 1])[1] == []
    found = make_scenarios(windows_of([0, 1, 0]), 64.0)
    assert found.recurring
    for kind in (0, 1):
        alike = np.abs(found.tokens[0] - 64.0 * KINDS[kind, 0, :, None]).sum(0) < 8.0
        assert found.weight[alike].sum() == 0.5


@pytest.mark.parametrize("seen", [3, 4, 5, 6])
def test_alternating_load_is_served_in_both_kinds(seen: int) -> None:
    topology = EpTopology(16, 2, 5)
    windows = windows_of([0, 1, 0, 1, 0, 1, 0, 1])
    current = rebalance_experts(windows[0], topology, algorithm="deepseek")
    plan = rebalance_experts(windows[:seen], topology, current=current)
    assert balancedness(windows[6:], plan).mean() > 0.9
