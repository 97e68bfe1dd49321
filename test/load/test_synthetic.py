"""The synthetic generator: totals, skew, drift and shifts."""

import numpy as np
import pytest

from equipoise.errors import ConfigError
from equipoise.load.synthetic import SyntheticLoad, synthetic_trace


def likeness(counts: np.ndarray, a: int, b: int) -> float:
    """Mean correlation of the experts' counts of two steps, over layers."""
    return float(np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(counts[a], counts[b], strict=True)]))


@pytest.mark.parametrize(("popularity", "skew"), [("zipf", 0.5), ("zipf", 1.5), ("dirichlet", 0.5), ("dirichlet", 5.0)])
def test_every_step_has_its_tokens_and_no_expert_more_than_them(popularity, skew):
    load = SyntheticLoad(6, 3, 32, tokens_per_step=5000, top_k=4, popularity=popularity, skew=skew, drift_steps=5)
    counts = synthetic_trace(load).logical_count
    assert counts.shape == (6, 3, 32)
    assert (counts.sum(-1) == 5000 * 4).all()
    assert counts.max() < 5000 * 1.1  # at most every token, in expectation


def test_the_seed_decides():
    first, second, other = (synthetic_trace(SyntheticLoad(4, 2, 16, seed=seed)).logical_count for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_more_skew_is_less_even():
    for popularity in ("zipf", "dirichlet"):
        shares = [
            synthetic_trace(SyntheticLoad(1, 8, 64, popularity=popularity, skew=skew)).logical_count.max(-1).mean()
            for skew in (0.1, 0.5, 1.0)
        ]
        assert shares == sorted(shares)


def test_drift_is_slow_and_a_shift_is_sudden():
    counts = synthetic_trace(SyntheticLoad(40, 8, 64, drift_steps=50, shift_at=(20,))).logical_count
    assert likeness(counts, 0, 1) > 0.95
    assert 0.5 < likeness(counts, 0, 19) < likeness(counts, 0, 5) < likeness(counts, 0, 1)
    assert abs(likeness(counts, 19, 20)) < 0.2
    assert likeness(counts, 20, 21) > 0.95


def test_a_partial_shift_leaves_the_rest():
    counts = synthetic_trace(SyntheticLoad(2, 16, 64, shift_at=(1,), shifted_fraction=0.25)).logical_count
    assert 0.3 < likeness(counts, 0, 1) < 0.95


def test_without_drift_only_sampling_noise_differs():
    assert likeness(synthetic_trace(SyntheticLoad(30, 4, 64)).logical_count, 0, 29) > 0.98


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_steps", 0),
        ("top_k", 9),
        ("skew", 0.0),
        ("skew", float("nan")),
        ("drift_steps", 0.0),
        ("shifted_fraction", 1.5),
        ("popularity", "uniform"),
    ],
)
def test_wrong_numbers_name_the_field(field, value):
    with pytest.raises(ConfigError) as caught:
        SyntheticLoad(**{"num_steps": 1, "num_logical_experts": 8, field: value})
    assert caught.value.field == field
