"""Small traces, what makes two equal, and the one line with which a file is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from equipoise.errors import InvalidInputError, TraceError
from equipoise.load.trace import LoadTrace


def assert_equal(left: LoadTrace, right: LoadTrace) -> None:
    for name in ("logical_count", "forward_pass_ids", "physical_count", "physical_to_logical_map"):
        a, b = getattr(left, name), getattr(right, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype.kind == b.dtype.kind == "i", name
            np.testing.assert_array_equal(a, b, name)
    assert left.metadata == right.metadata


def small_trace(seed: int = 0) -> LoadTrace:
    rng = np.random.default_rng(seed)
    p2l = np.tile(np.arange(6) % 4, (2, 1))
    return LoadTrace(
        rng.integers(0, 99, (5, 2, 4)), np.arange(7, 12), rng.integers(0, 99, (5, 2, 6)), p2l, {"source": "a test"}
    )


def write_npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez_compressed(path, **arrays)
    return path


def refusal(path: Path) -> str:
    """The one line with which LoadTrace.open refuses the file; it names the file."""
    with pytest.raises(TraceError) as caught:
        LoadTrace.open(path)
    message = str(caught.value)
    assert isinstance(caught.value, InvalidInputError)
    assert str(path) in message
    assert "\n" not in message
    return message
