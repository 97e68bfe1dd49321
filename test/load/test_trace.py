"""LoadTrace: its own format, and the npz traces."""

import json
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from equipoise.errors import TraceError
from equipoise.load.trace import LoadTrace
from helpers.traces import assert_equal, refusal, small_trace, write_npz

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def traces(draw):
    steps, layers, experts, slots = draw(st.tuples(*[st.integers(low, 5) for low in (0, 1, 1, 1)]))
    counts = st.integers(0, 2**62)
    physical = draw(st.none() | hnp.arrays(np.int64, (steps, layers, slots), elements=counts))
    p2l = draw(st.none() | hnp.arrays(np.int64, (layers, slots), elements=st.integers(0, experts - 1)))
    return LoadTrace(
        draw(hnp.arrays(np.int64, (steps, layers, experts), elements=counts)),
        draw(hnp.arrays(np.int64, (steps,), elements=counts)),
        physical,
        p2l,
        draw(st.dictionaries(st.text(), JSON_VALUES, max_size=3)),
    )


@MANY
@given(trace=traces())
def test_save_and_open_give_the_same_trace(trace, tmp_path):
    trace.save(tmp_path / "trace")
    assert_equal(LoadTrace.open(tmp_path / "trace"), trace)


def test_the_same_trace_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        small_trace().save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_saved_file_is_readable_with_numpy_alone(tmp_path):
    small_trace().save(tmp_path / "trace.npz")
    with np.load(tmp_path / "trace.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["logical_count"], small_trace().logical_count)
        assert json.loads(file["header"].tobytes())["format"] == "equipoise.load_trace"


def test_steps_are_numbered_from_zero_if_no_ids_are_given():
    assert LoadTrace(np.ones((3, 1, 2), dtype=int)).forward_pass_ids.tolist() == [0, 1, 2]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "trace"
    small_trace().save(path)
    before = path.read_bytes()

    def full_disk(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        small_trace(1).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["trace"]


def test_metadata_that_is_not_json_is_a_trace_error_and_leaves_no_file(tmp_path):
    with pytest.raises(TraceError, match="not JSON serializable"):
        LoadTrace(np.ones((1, 1, 1), dtype=int), metadata={"x": object()}).save(tmp_path / "trace")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logical_count": np.full((1, 1, 2), -1)}, r"logical_count\[0, 0, 0\] is -1"),
        ({"logical_count": np.array([[[1.0, np.nan]]])}, r"logical_count\[0, 0, 1\] is nan"),
        ({"logical_count": np.array([[[1.0, -0.5]]])}, r"is -0\.5, must be a finite count"),
        ({"logical_count": np.array([[[1.0, np.inf]]])}, "is inf"),
        ({"logical_count": np.array([[[2**63]]], dtype=np.uint64)}, "9223372036854775808"),
        ({"logical_count": np.ones((2, 2), dtype=int)}, "3 dimensions"),
        ({"logical_count": np.ones((1, 0, 2), dtype=int)}, "must have layers"),
        ({"logical_count": np.ones((1, 1, 2), dtype=bool)}, "must be numbers"),
        ({"forward_pass_ids": np.arange(3)}, r"forward_pass_ids must have shape \(1,\), got \(3,\)"),
        ({"physical_count": np.ones((2, 1, 4), dtype=int)}, r"physical_count must have shape \(1, 1, 4\)"),
        ({"physical_to_logical_map": np.array([[0, 1, 2, 0]])}, "expert 2 of 2"),
        ({"physical_to_logical_map": np.zeros((2, 4), dtype=int)}, r"must have shape \(1, 4\)"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(TraceError, match=message):
        LoadTrace(**{"logical_count": np.ones((1, 1, 2), dtype=int), **fields})


# ------------------------------------------------------------------ npz files of single tokens and of subjects


def test_tokens_are_cut_into_steps_and_counted_per_layer(tmp_path):
    rng = np.random.default_rng(0)
    topk = rng.permuted(np.tile(np.arange(8), (25, 3, 1)), axis=2)[..., :2].astype(np.int16)
    path = write_npz(tmp_path / "t.npz", topk=topk, seq_lens=np.array([20, 5]))
    trace = LoadTrace.open(path, tokens_per_step=10)
    expected = np.zeros((3, 3, 8), dtype=int)
    for token in range(25):
        for layer in range(3):
            for expert in topk[token, layer]:
                expected[token // 10, layer, expert] += 1
    np.testing.assert_array_equal(trace.logical_count, expected)


def test_minus_one_is_no_expert_and_the_number_of_experts_can_be_given(tmp_path):
    path = write_npz(tmp_path / "t.npz", topk=np.array([[[0, -1]], [[2, 0]]]))
    assert LoadTrace.open(path).logical_count.tolist() == [[[2, 0, 1]]]
    assert LoadTrace.open(path, num_logical_experts=5).logical_count.tolist() == [[[2, 0, 1, 0, 0]]]
    with pytest.raises(TraceError, match=r"0 to 2|-1 to 2"):
        LoadTrace.open(path, num_logical_experts=2)


def test_subjects_are_steps_scaled_by_their_tokens(tmp_path):
    freq = np.array([[[0.5, 0.25]], [[0.1, 0.9]]])
    path = write_npz(tmp_path / "f.npz", freq=freq, mean_tokens=np.array([100.0, 10.0]))
    assert LoadTrace.open(path).logical_count.tolist() == [[[50, 25]], [[1, 9]]]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"topk": np.zeros((4, 2), dtype=np.int16)}, "topk must be integers"),
        ({"topk": np.zeros((4, 2, 2))}, "topk must be integers"),
        ({"topk": np.full((4, 2, 2), -1)}, "no expert"),
        ({"topk": np.full((4, 2, 2), -2)}, "-2"),
        ({"topk": np.full((1, 1, 1), 10**9)}, "1000000000"),
        ({"topk": np.zeros((4, 1, 1), dtype=int), "seq_lens": np.array([3])}, "seq_lens must add up to the 4 tokens"),
        ({"freq": np.zeros((4, 2))}, "freq must have shape"),
        ({"freq": np.full((1, 1, 2), np.nan)}, "nan"),
        ({"freq": np.full((1, 1, 2), -0.5)}, "-500"),
        ({"freq": np.ones((2, 1, 2)), "mean_tokens": np.ones(3)}, "mean_tokens must have shape"),
        ({"freq": np.array([[["a"]]])}, "must hold numbers"),
        ({"weights": np.ones(3)}, "2 or 3 dimensions"),
        ({"weights": np.ones(3), "others": np.ones(3)}, "needs one array, or `topk`"),
    ],
)
def test_wrong_npz_files_are_refused(tmp_path, arrays, message):
    assert message in refusal(write_npz(tmp_path / "bad.npz", **arrays))
