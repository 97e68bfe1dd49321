"""LoadTrace: its own format, the npz traces, and files that are not what they say."""

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from equipoise.errors import InvalidInputError, TraceError
from equipoise.formats import archive as archive_module
from equipoise.load.trace import LoadTrace

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


# ------------------------------------------------------------------ files that are not what they say


def test_missing_empty_and_special_files(tmp_path):
    assert "no such file" in refusal(tmp_path / "missing")
    (tmp_path / "empty").touch()
    assert "empty" in refusal(tmp_path / "empty")
    (tmp_path / "text").write_text("hello")
    assert "neither" in refusal(tmp_path / "text")
    (tmp_path / "folder").mkdir()
    assert "directory" in refusal(tmp_path / "folder")
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(tmp_path / "pipe")


class Evil:
    """Unpickling this creates a file: the proof that code ran."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def test_no_pickle_is_ever_run(tmp_path):
    target = tmp_path / "code_ran"
    torch.save({"logical_count": Evil(target)}, tmp_path / "torch.pt")
    np.savez(tmp_path / "object.npz", topk=np.array([[[Evil(target)]]], dtype=object))
    (tmp_path / "bare.pt").write_bytes(pickle.dumps({"logical_count": Evil(target)}))
    assert "objects other than tensors" in refusal(tmp_path / "torch.pt")
    assert "must hold numbers" in refusal(tmp_path / "object.npz")
    assert "neither" in refusal(tmp_path / "bare.pt")
    assert not target.exists()
    torch.load(tmp_path / "torch.pt", weights_only=False)  # the file would do harm, were it trusted
    assert target.exists()


@pytest.mark.parametrize("members", [["topk.npy"], ["archive/data.pkl", "archive/data/0"]])
def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch, members):
    monkeypatch.setattr(archive_module, "MAX_BYTES", 1 << 20)
    path = tmp_path / "bomb"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member in members:
            archive.writestr(member, bytes(4 << 20))
    assert path.stat().st_size < 20_000
    assert "bytes when unpacked, more than the limit of 1 MiB" in refusal(path)


def test_a_whole_file_below_the_limit_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(archive_module, "MAX_BYTES", 1 << 20)
    small_trace().save(tmp_path / "trace")
    assert_equal(LoadTrace.open(tmp_path / "trace"), small_trace())


@pytest.mark.parametrize("shape", [(1 << 40, 1, 1), (1 << 31, 1 << 31, 1 << 31), (-1, 2, 2), (3, 2, 2), (1, 2, 2)])
def test_a_shape_that_the_data_do_not_have_is_refused(tmp_path, shape):
    path = tmp_path / "shape.npz"
    with zipfile.ZipFile(path, "w") as archive, archive.open("topk.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<i8", "fortran_order": False, "shape": shape})
        member.write(bytes(64))
    message = refusal(path)
    assert "more than the limit" in message or "should take" in message


def test_the_limit_holds_for_counts_made_from_tokens(tmp_path, monkeypatch):
    path = write_npz(tmp_path / "t.npz", topk=np.full((1000, 1, 1), 999))
    monkeypatch.setattr(archive_module, "MAX_BYTES", 1_000_000)
    assert "logical_count of shape (1000, 1, 1000)" in _refused_with(path, tokens_per_step=1)
    assert LoadTrace.open(path, tokens_per_step=100).num_steps == 10


def _refused_with(path: Path, **options: int) -> str:
    with pytest.raises(TraceError) as caught:
        LoadTrace.open(path, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"format": "equipoise.load_trace", "version": 2, "metadata": {}}, "version 2 of the format"),
        ({"format": "other", "version": 1, "metadata": {}}, "format"),
        ({"format": "equipoise.load_trace", "version": 1, "metadata": []}, "metadata must be a JSON object"),
        ([1], "format"),
        (
            {"format": "equipoise.load_trace", "version": 1, "metadata": {}, "arrays": ["logical_count", "x"]},
            "its header lists",
        ),
    ],
)
def test_headers_of_other_versions_and_formats_are_refused(tmp_path, header, message):
    encoded = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    path = write_npz(tmp_path / "h.npz", header=encoded, logical_count=np.ones((1, 1, 1), dtype=int))
    assert message in refusal(path)


def own_bytes() -> bytes:
    buffer = io.BytesIO()
    archive_module.write_archive(
        buffer,
        {
            "format": "equipoise.load_trace",
            "version": 1,
            "arrays": ["forward_pass_ids", "logical_count"],
            "metadata": {"source": "x" * 50},
        },
        {"logical_count": np.arange(40).reshape(5, 2, 4), "forward_pass_ids": np.arange(5)},
    )
    return buffer.getvalue()


def torch_bytes(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def token_bytes() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, topk=np.arange(60).reshape(15, 2, 2) % 7, seq_lens=np.array([15]))
    return buffer.getvalue()


WHOLE_FILES = [
    own_bytes(),
    token_bytes(),
    torch_bytes({"rank": 0, "logical_count": torch.ones(3, 2, 4, dtype=torch.int32)}),
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.integers(0, 2), share=st.floats(0, 1, exclude_max=True))
@example(which=0, share=0.0)
def test_a_truncated_file_is_a_trace_error(which, share, tmp_path):
    whole = WHOLE_FILES[which]
    path = tmp_path / "cut"
    path.write_bytes(whole)
    LoadTrace.open(path)
    path.write_bytes(whole[: int(len(whole) * share)])
    refusal(path)


def test_a_damaged_name_of_a_member_is_a_trace_error(tmp_path):
    """Without the name of its header, the array in it would pass for one that is not ours."""
    damaged = WHOLE_FILES[0].replace(b"header.npyPK", b"\0eader.npyPK")
    (tmp_path / "damaged").write_bytes(damaged)
    assert "damaged" in refusal(tmp_path / "damaged")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), which=st.integers(0, 2))
def test_damaged_bytes_are_a_trace_error_or_do_not_matter(data, which, tmp_path):
    damaged = bytearray(WHOLE_FILES[which])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "whole").write_bytes(WHOLE_FILES[which])
    (tmp_path / "damaged").write_bytes(damaged)
    try:
        found = LoadTrace.open(tmp_path / "damaged")
    except TraceError:
        refusal(tmp_path / "damaged")
        return
    # Dates and attributes of a zip say nothing about its content; checksums guard what does.
    assert_equal(found, LoadTrace.open(tmp_path / "whole"))
