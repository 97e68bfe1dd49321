"""SGLang's dumps, written here exactly as its recorder writes them (0.5.23, srt/eplb/expert_distribution.py)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from equipoise.errors import TraceError
from equipoise.formats.numbers import to_logical_count
from equipoise.load.trace import LoadTrace

MANY = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_stat(path: Path, ring: np.ndarray, utilization: float | None = None) -> Path:
    torch.save(
        {
            "rank": 0,
            "logical_count": torch.tensor(ring, dtype=torch.int32),
            "average_utilization_rate_over_window": utilization,
        },
        str(path),
    )
    return path


def record(pass_id: int, rank: int, count: np.ndarray, key: str = "primary") -> dict:
    return {
        "forward_pass_id": pass_id,
        "rank": rank,
        "gatherer_key": key,
        "global_physical_count": torch.tensor(count, dtype=torch.int32),
    }


def write_per_pass(path: Path, records: list[dict], p2l: np.ndarray) -> Path:
    torch.save({"records": records, "last_physical_to_logical_map": torch.tensor(p2l)}, str(path))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(TraceError) as caught:
        LoadTrace.open(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


P2L = np.array([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 3]])


@MANY
@given(
    steps=hnp.arrays(np.int32, st.tuples(st.integers(1, 6), *[st.integers(1, 4)] * 2), elements=st.integers(1, 999)),
    unwritten=st.integers(0, 8),
    start=st.integers(0, 20),
)
def test_a_stat_ring_gives_back_its_steps_in_order(steps, unwritten, start, tmp_path):
    num_rows = len(steps) + unwritten
    ring = np.zeros((num_rows, *steps.shape[1:]), dtype=np.int32)
    if not unwritten:
        start = 0  # a full ring does not say where it starts
    for index, step in enumerate(steps):
        ring[(start + index) % num_rows] = step
    trace = LoadTrace.open(write_stat(tmp_path / "stat.pt", ring))
    np.testing.assert_array_equal(trace.logical_count, steps)
    assert trace.logical_count.dtype.kind == "i"


def test_utilization_is_kept_as_metadata(tmp_path):
    trace = LoadTrace.open(write_stat(tmp_path / "stat.pt", np.ones((2, 1, 3)), 0.75))
    assert trace.metadata["average_utilization_rate_over_window"] == 0.75


def test_an_idle_step_inside_a_recording_does_not_reorder_it(tmp_path):
    ring = np.zeros((10, 1, 1))
    ring[:6, 0, 0] = [1, 2, 0, 3, 4, 5]  # row 2 is an idle step, rows 6 to 9 were never written
    trace = LoadTrace.open(write_stat(tmp_path / "stat.pt", ring))
    assert trace.logical_count[:, 0, 0].tolist() == [1, 2, 3, 4, 5]


@MANY
@given(
    counts=hnp.arrays(
        np.int32, st.tuples(st.integers(1, 5), st.integers(1, 4)).map(lambda s: (*s, 2, 6)), elements=st.integers(1, 99)
    ),
    one_file=st.booleans(),
    extra_keys=st.booleans(),
)
def test_per_pass_dumps_are_summed_over_ranks_and_replicas(counts, one_file, extra_keys, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dumps")
    num_passes, num_ranks = counts.shape[:2]
    records = [[record(10 + i, rank, counts[i, rank]) for i in range(num_passes)] for rank in range(num_ranks)]
    if extra_keys:  # recorder mode per_token writes these as well
        for one in records[0]:
            one["topk_ids_of_layer"] = torch.zeros(2, 3, 2, dtype=torch.int32)
    if one_file:
        path = write_per_pass(folder / "all.pt", [one for rank in records for one in rank], P2L)
    else:
        path = folder
        for rank in range(num_ranks):
            write_per_pass(folder / f"expert_distribution_recorder_1732.5_{rank}.pt", records[rank], P2L)
    trace = LoadTrace.open(path)
    total = counts.sum(1)
    expected = np.zeros((num_passes, 2, 4), dtype=int)
    for layer in range(2):
        for slot, expert in enumerate(P2L[layer]):
            expected[:, layer, expert] += total[:, layer, slot]
    np.testing.assert_array_equal(trace.logical_count, expected)
    np.testing.assert_array_equal(trace.physical_count, total)
    np.testing.assert_array_equal(trace.physical_to_logical_map, P2L)
    assert trace.forward_pass_ids.tolist() == list(range(10, 10 + num_passes))
    assert trace.metadata["ranks"] == list(range(num_ranks))


def test_passes_that_a_rank_missed_and_idle_passes_are_dropped(tmp_path):
    ones, zeros = np.ones((2, 6)), np.zeros((2, 6))
    write_per_pass(tmp_path / "0.pt", [record(1, 0, ones), record(2, 0, ones), record(3, 0, zeros)], P2L)
    write_per_pass(tmp_path / "1.pt", [record(2, 1, ones), record(3, 1, zeros)], P2L)
    trace = LoadTrace.open(tmp_path)
    assert trace.forward_pass_ids.tolist() == [2]
    assert trace.metadata["incomplete_passes_dropped"] == 1


def test_two_gatherers_of_one_rank_add_up(tmp_path):
    ones = np.ones((2, 6))
    path = write_per_pass(tmp_path / "0.pt", [record(1, 0, ones, "child_a"), record(1, 0, ones, "child_b")], P2L)
    assert LoadTrace.open(path).physical_count.sum() == 24


ONES = np.ones((2, 6))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rank": 0, "logical_count": torch.zeros(4, 2, 3, dtype=torch.int32)}, "no step with a token"),
        ({"logical_count": torch.ones(4)}, "3 dimensions"),
        ({"logical_count": torch.full((1, 2, 2), -3)}, "-3"),
        ({"logical_count": torch.full((1, 2, 2), float("nan"))}, "nan"),
        ({"logical_count": torch.ones(1, 2, 2, dtype=torch.complex64)}, "dense tensor"),
        ({"logical_count": torch.ones(1, 2, 2).to_sparse()}, "dense tensor"),
        ({"logical_count": torch.ones(1).expand(1 << 20, 1 << 20, 1 << 10)}, "more than the limit"),
        ({"logical_count": torch.ones(1).expand(1, 1, 1 << 20)}, "1048576 experts"),
        ({"logical_count": "many"}, "3 dimensions"),
        ({"logical_count": [[[1, 2]], [[1]]]}, "different lengths"),
        ({"a": torch.ones(2), "b": 1}, "neither a stat dump"),
        (torch.ones(2), "2 or 3 dimensions"),
        ({"records": {}, "last_physical_to_logical_map": torch.tensor(P2L)}, "records must be a list"),
        ({"records": [], "last_physical_to_logical_map": torch.tensor(P2L)}, "no forward pass"),
        (
            {"records": [{"rank": 0}], "last_physical_to_logical_map": torch.tensor(P2L)},
            "records[0] must have the keys",
        ),
        (
            {"records": [record(1, 0, ONES), record(1, 0, ONES)], "last_physical_to_logical_map": torch.tensor(P2L)},
            "two records of forward pass 1 from rank 0",
        ),
        (
            {"records": [record(1, 0, ONES[:, :5])], "last_physical_to_logical_map": torch.tensor(P2L)},
            "has shape (2, 5)",
        ),
        ({"records": [record(1, 0, -ONES)], "last_physical_to_logical_map": torch.tensor(P2L)}, "at least 0"),
        ({"records": [record(-1, 0, ONES)], "last_physical_to_logical_map": torch.tensor(P2L)}, "forward_pass_id"),
        ({"records": [record(1, 0, ONES)], "last_physical_to_logical_map": torch.tensor(P2L - 1)}, "expert ids"),
        (
            {"records": [record(1, 0, ONES)], "last_physical_to_logical_map": torch.tensor(P2L + (1 << 20))},
            "expert ids",
        ),
    ],
)
def test_dumps_with_wrong_content_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "bad.pt")
    assert message in refusal(tmp_path / "bad.pt")


def test_a_flipped_bit_in_the_counts_is_found(tmp_path):
    path = write_stat(tmp_path / "stat.pt", np.full((4, 2, 8), 0x01020304))
    data = bytearray(path.read_bytes())
    data[data.index(b"\x04\x03\x02\x01") + 5] ^= 1  # torch.load alone would read another count and say nothing
    path.write_bytes(data)
    assert "checksum" in refusal(path)


def test_files_of_different_recordings_are_refused(tmp_path):
    write_per_pass(tmp_path / "0.pt", [record(1, 0, ONES)], P2L)
    write_per_pass(tmp_path / "1.pt", [record(1, 1, ONES)], P2L[::-1].copy())
    assert "2 recordings that are not of one run" in refusal(tmp_path)


def test_a_folder_names_the_file_that_is_wrong(tmp_path):
    write_per_pass(tmp_path / "0.pt", [record(1, 0, ONES)], P2L)
    write_stat(tmp_path / "1.pt", np.ones((1, 2, 4)))
    assert "2 recordings that are not of one run" in refusal(tmp_path)


def test_logical_counts_of_an_expert_without_a_slot_are_zero():
    physical = np.arange(12).reshape(2, 1, 6)
    logical = to_logical_count(physical, np.array([[0, 0, 2, 2, 2, 0]]), 4)
    assert logical.tolist() == [[[0 + 1 + 5, 0, 2 + 3 + 4, 0]], [[6 + 7 + 11, 0, 8 + 9 + 10, 0]]]
