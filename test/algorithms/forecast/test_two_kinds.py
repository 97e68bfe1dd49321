"""Two windows of different kinds of load are told from drift, from counting noise and from a burst."""

from __future__ import annotations

import numpy as np
import pytest

from equipoise.algorithms.forecast.burst import are_of_two_kinds
from equipoise.algorithms.forecast.scenarios import make_scenarios

NUM_LAYERS, NUM_EXPERTS = 6, 64


def popularity(seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).gamma(0.6, 1.0, (NUM_LAYERS, NUM_EXPERTS))
    return np.asarray(drawn / drawn.sum(1, keepdims=True))


def next_load(kind: str, before: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(9)
    if kind == "drift":
        before = before * np.exp(rng.normal(0.0, 0.2, before.shape))
    elif kind == "another":
        before = popularity(2)
    elif kind == "half of another":
        before = 0.5 * before + 0.5 * popularity(2)
    elif kind == "burst":
        hot = rng.permuted(np.tile(np.arange(NUM_EXPERTS) < 4, (NUM_LAYERS, 1)), axis=1)
        before = before * (2 / 3) + hot / 12
    return np.asarray(before / before.sum(1, keepdims=True))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("the same", False), ("drift", False), ("another", True), ("half of another", True), ("burst", False)],
)
def test_of_two_windows(kind: str, expected: bool) -> None:
    rng = np.random.default_rng(3)
    before = popularity(1)
    windows = rng.poisson(np.stack([before, next_load(kind, before)]) * 65_536).astype(float)
    for order in (windows, windows[::-1]):
        assert make_scenarios(order, 16.0).two_kinds is expected


def test_of_three_windows_it_is_not_said() -> None:
    windows = np.random.default_rng(3).poisson(np.stack([popularity(seed) for seed in (1, 2, 4)]) * 65_536)
    assert make_scenarios(windows.astype(float), 16.0).two_kinds is False


def test_a_unit_of_load_makes_no_difference() -> None:
    one, other = popularity(1), popularity(2)
    assert are_of_two_kinds(one, other)
    assert are_of_two_kinds(one * 1e6, other * 1e6)
    assert not are_of_two_kinds(one, one)


def test_counting_noise_on_level_load_is_no_second_kind() -> None:
    """What little such windows differ from level ones has nothing in common."""
    counted = np.random.default_rng(0).poisson(1000.0, (2, NUM_LAYERS, NUM_EXPERTS)).astype(float)
    assert are_of_two_kinds(*counted)
    assert make_scenarios(counted, 16.0).two_kinds is False
