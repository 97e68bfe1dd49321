"""Equipoise's trace format: written step by step, mapped, appended to, cut off, and plain safetensors when closed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from equipoise.errors import ConfigError, TraceError
from equipoise.formats.trace_file import TraceDescription
from equipoise.formats.trace_writer import TraceWriter
from equipoise.load.trace import LoadTrace

MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
L, E = 2, 5
DESCRIPTION = TraceDescription(L, E, layer_ids=[3, 4], model="m", top_k=2, metadata={"who": "a test"})


def counts(num_steps: int, seed: int = 0, ranks: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, (num_steps, ranks, L, E))


def write(path: Path, values: np.ndarray, description: TraceDescription = DESCRIPTION, **more: object) -> Path:
    with TraceWriter(path, description) as writer:
        writer.append(values, forward_pass_ids=np.arange(len(values)), **more)
    return path


def test_a_trace_comes_back_with_everything(tmp_path: Path) -> None:
    values = counts(6, ranks=3)
    description = TraceDescription(L, E, source_ranks=3, model="m", topology={"num_ranks": 3})
    placements = np.arange(2 * L * 6).reshape(2, L, 6) % E
    with TraceWriter(tmp_path / "t", description, placements) as writer:
        writer.append(
            values[:4], forward_pass_ids=np.arange(4), phases=np.array([1, 1, 2, 2]), timestamps=np.arange(4.0)
        )
        writer.append(values[4:], forward_pass_ids=np.arange(4, 6), placement=1)
    trace = LoadTrace.open(tmp_path / "t")
    np.testing.assert_array_equal(trace.logical_count, values.sum(1))
    np.testing.assert_array_equal(trace.rank_count, values)
    np.testing.assert_array_equal(trace.physical_to_logical_map, placements[1])
    assert trace.phases.tolist() == [1, 1, 2, 2, 0, 0]
    assert trace.timestamps[:4].tolist() == [0, 1, 2, 3]
    assert (trace.metadata["model"], trace.metadata["num_ranks"]) == ("m", 3)


def test_a_closed_file_is_plain_safetensors(tmp_path: Path) -> None:
    write(tmp_path / "t.safetensors", counts(4))
    with safe_open(tmp_path / "t.safetensors", "np") as file:
        assert file.metadata()["format"] == "equipoise.trace"
        assert file.get_tensor("steps").shape == (4, DESCRIPTION.record().itemsize)


def test_counts_are_mapped_and_not_copied(tmp_path: Path) -> None:
    trace = LoadTrace.open(write(tmp_path / "t", counts(4)))
    base = trace.logical_count
    while base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)


@MANY
@given(parts=st.lists(st.integers(0, 3), min_size=1, max_size=4), lost=st.integers(0, 400), reopen=st.booleans())
def test_a_file_cut_off_opens_to_its_last_whole_step(parts: list[int], lost: int, reopen: bool, tmp_path: Path) -> None:
    """And can be appended to from there."""
    path = tmp_path / "t"
    path.unlink(missing_ok=True)
    values = counts(sum(parts) + 1)
    write(path, values[:1])
    writer = TraceWriter(path, DESCRIPTION)
    at = 1
    for size in parts:
        writer.append(values[at : at + size], forward_pass_ids=np.arange(at, at + size))
        at += size
    writer._file.flush()  # the process dies here: no flush(), no close()
    whole = path.stat().st_size
    size = DESCRIPTION.record().itemsize
    kept = max(0, -(-lost // size))
    with path.open("r+b") as file:
        file.truncate(whole - min(lost, (at - 1) * size))
    expected = at - min(kept, at - 1)
    np.testing.assert_array_equal(LoadTrace.open(path).logical_count, values[:expected, 0])
    if reopen:
        with TraceWriter(path, DESCRIPTION) as again:
            again.append(values[expected:], forward_pass_ids=np.arange(expected, len(values)))
        np.testing.assert_array_equal(LoadTrace.open(path).logical_count, values[:, 0])


def test_a_record_that_never_reached_the_disk_ends_the_trace(tmp_path: Path) -> None:
    path = write(tmp_path / "t", counts(2))
    writer = TraceWriter(path, DESCRIPTION)
    writer.append(counts(2, 1), forward_pass_ids=np.arange(2, 4))
    writer._file.flush()
    size, data = DESCRIPTION.record().itemsize, bytearray(path.read_bytes())
    data[-size:] = bytes(size)  # as a crash leaves a page
    path.write_bytes(data)
    trace = LoadTrace.open(path)
    assert trace.num_steps == 3
    assert "did not close the file" in trace.notes[0]


def test_tokens_keep_their_steps_and_lose_the_last_one_with_its_tokens(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(E), (10, L, 1)), axis=-1)[..., :2]
    description = TraceDescription(L, E, top_k=2, tokens=True)
    with TraceWriter(tmp_path / "t", description) as writer:
        writer.append(ids, forward_pass_ids=np.array([0] * 4 + [1] * 3 + [2] * 3))
    trace = LoadTrace.open(tmp_path / "t")
    assert trace.token_offsets.tolist() == [0, 4, 7, 10]
    np.testing.assert_array_equal(trace.logical_count[1, 0], np.bincount(ids[4:7, 0].ravel(), minlength=E))
    with (tmp_path / "t").open("r+b") as file:
        file.truncate((tmp_path / "t").stat().st_size - 1)
    assert LoadTrace.open(tmp_path / "t").num_steps == 2


def test_appending_to_something_else_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t", counts(2))
    with pytest.raises(ConfigError, match="holds something else"):
        TraceWriter(path, TraceDescription(L, E + 1))
    with pytest.raises(ConfigError, match="cannot be written"):
        TraceWriter(tmp_path / "missing" / "t", DESCRIPTION)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"version": "1"', b'"version": "9"', "version '9' of the format; this program reads version 1"),
        (b"num_layers", b"num_lawyers", "damaged description"),
        (rb"\"num_layers\": 2", rb"\"num_layers\": 0", "must be in"),
        (rb"\"num_logical_experts\": 5", rb"\"num_logical_experts\": 6", "does not fit its description"),
        (b'"steps"', b'"stops"', "'steps' is missing"),
    ],
)
def test_damaged_headers_are_named(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    path = write(tmp_path / "t", counts(2))
    data = path.read_bytes()
    assert old in data
    path.write_bytes(
        data.replace(old, new, 1) if len(old) == len(new) else data.replace(old, new, 1).replace(b"    ", b"   ", 1)
    )
    with pytest.raises(TraceError, match=message):
        LoadTrace.open(path)
