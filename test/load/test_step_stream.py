"""Steps written in the background: what is taken is written, what is dropped is told, and no step ever waits."""

from __future__ import annotations

import errno
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import ConfigError, StorageError, TraceError
from equipoise.formats.container import read_safetensors_header
from equipoise.formats.trace_file import TraceDescription
from equipoise.load.step_stream import CountStream, TokenStream
from equipoise.load.step_writer import StepSink
from equipoise.load.stream_file import TraceFileSink, open_trace_file
from equipoise.load.stream_report import MAX_RANGES, DroppedSteps, StreamReport
from equipoise.load.trace import LoadTrace

L, P, E = 2, 6, 4
MAP = torch.tensor([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 0, 0]])


class SlowDisk:
    """Takes steps only while its gate is open; remembers what it took."""

    path = "/slow/rank_0"

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.steps: dict[int, np.ndarray] = {}
        self.closed: StreamReport | None = None
        self.full_at: int | None = None

    def append(
        self, values: np.ndarray, *, forward_pass_ids: np.ndarray, phases: np.ndarray, timestamps: np.ndarray
    ) -> None:
        assert self.gate.wait(20)
        assert set(phases.tolist()) == {2}
        assert (timestamps > 0).all()
        if self.full_at in forward_pass_ids:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.steps.update(zip(forward_pass_ids.tolist(), values[:, 0].copy(), strict=True))

    def close(self, report: StreamReport) -> None:
        self.closed = report


def new_stream(sink: SlowDisk, num_staged: int = 3, max_records: int = 1000) -> CountStream:
    return CountStream(L, E, sink, num_staged=num_staged, max_records=max_records, device=torch.device("cpu"))


def physical_of(step: int) -> torch.Tensor:
    return torch.arange(L * P, dtype=torch.int32).reshape(L, P) + step


def logical_of(step: int) -> np.ndarray:
    """The oracle, slot by slot."""
    load = np.zeros((L, E), np.int64)
    for layer, slot in np.ndindex(L, P):
        load[layer, MAP[layer, slot]] += physical_of(step)[layer, slot].item()
    return load


def add(stream: CountStream, *steps: int) -> None:
    for step in steps:
        stream.add(physical_of(step), MAP, step, "decode")


def end(stream: CountStream) -> StreamReport:
    stream.stop()
    stream.join(20)
    return stream.report()


def append(sink: StepSink, steps: list[int], offset: int) -> None:
    ids = np.array(steps)
    counts = np.array([logical_of(step + offset) for step in steps])
    sink.append(counts[:, None], forward_pass_ids=ids, phases=np.full(len(ids), 2), timestamps=10.0 + ids)


def until(condition: object) -> None:
    deadline = time.monotonic() + 20
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_disk_that_stands_still_costs_steps_and_never_blocks_one() -> None:
    disk = SlowDisk()
    stream = new_stream(disk, num_staged=3)
    began = time.monotonic()
    add(stream, *range(10))  # none of which the disk takes
    assert time.monotonic() - began < 1
    report = stream.report()
    assert (report.num_steps, report.num_written, report.num_dropped, report.dropped) == (3, 0, 7, [[3, 9]])
    disk.gate.set()
    until(lambda: len(stream._free) == 3)
    disk.gate.clear()
    add(stream, 10, 11, 12, 13, 14)
    stream.stop()
    assert not stream.report().finished
    disk.gate.set()
    report = end(stream)
    assert (report.num_steps, report.num_written, report.num_dropped) == (6, 6, 9)
    assert (report.dropped, report.finished, report.error) == ([[3, 9], [13, 14]], True, None)
    assert disk.closed is not None
    assert (disk.closed.num_dropped, disk.closed.dropped) == (9, [[3, 9], [13, 14]])
    assert list(disk.steps) == [0, 1, 2, 10, 11, 12]
    for step, counts in disk.steps.items():
        assert counts.tolist() == logical_of(step).tolist(), step


def test_a_full_disk_ends_the_writing_and_what_was_lost_is_told() -> None:
    disk = SlowDisk()
    disk.full_at = 1
    stream = new_stream(disk, num_staged=4)
    disk.gate.set()
    add(stream, 0)
    until(lambda: stream.report().num_written == 1)
    add(stream, 1, 2)
    until(lambda: stream.report().error is not None)
    add(stream, 3, 4)
    report = end(stream)
    assert report.error == "OSError: [Errno 28] No space left on device"
    assert (report.num_written, report.num_dropped) == (1, 4)
    # Whether the writer had taken step 2 when step 1 failed is a matter of moments.
    assert report.dropped in ([[1, 2], [3, 4]], [[1, 1], [2, 4]])
    assert list(disk.steps) == [0], "a step behind a broken one was written"


def test_a_recording_has_an_end_of_its_own() -> None:
    disk = SlowDisk()
    disk.gate.set()
    stream = new_stream(disk, num_staged=8, max_records=2)
    add(stream, *range(5))
    report = end(stream)
    assert (report.num_written, report.dropped) == (2, [[2, 4]])
    assert report.error == "the file may hold 2 records, and does"


def test_ranges_of_dropped_steps_are_bounded() -> None:
    dropped = DroppedSteps()
    for step in range(0, 100, 2):
        dropped.add(step)
        dropped.end_range()
    assert dropped.count == 50
    assert dropped.ranges[:2] == [[0, 0], [2, 2]]
    assert len(dropped.ranges) == MAX_RANGES
    assert dropped.ranges[-1] == [2 * (MAX_RANGES - 1), 98]


class TestFiles:
    def description(self, rank: int, num_ranks: int = 2, name: str = "one") -> TraceDescription:
        part = {"id": name, "rank": rank, "num_ranks": num_ranks}
        return TraceDescription(L, E, layer_ids=[3, 4], topology={"num_ranks": 2}, metadata={"recording": part})

    def write(self, folder: Path, rank: int, steps: list[int], report: StreamReport | None, **given: object) -> Path:
        sink = open_trace_file(str(folder), "one", self.description(rank, **given), rank)  # type: ignore[arg-type]
        append(sink, steps, 100 * rank)
        if report is not None:  # else the process dies here
            sink.close(report)
        return Path(sink.path)

    @staticmethod
    def report(dropped: list[list[int]], error: str | None = None) -> StreamReport:
        return StreamReport("", 0, 0, sum(b - a + 1 for a, b in dropped), dropped, True, error)

    def test_ranks_are_summed_over_the_steps_that_all_of_them_have(self, tmp_path: Path) -> None:
        self.write(tmp_path, 0, [0, 1, 2, 5], self.report([[3, 4]]))
        self.write(tmp_path, 1, [0, 2, 3, 4, 5], self.report([[1, 1]], "OSError: no room"))
        trace = LoadTrace.open(tmp_path / "one")
        assert trace.forward_pass_ids.tolist() == [0, 2, 5]
        expected = np.array([[logical_of(step + 100 * rank) for rank in (0, 1)] for step in (0, 2, 5)])
        np.testing.assert_array_equal(trace.logical_count, expected.sum(1))
        np.testing.assert_array_equal(trace.rank_count, expected)
        assert trace.phases.tolist() == [2, 2, 2]
        assert trace.timestamps.tolist() == [10, 12, 15]
        assert trace.layer_ids.tolist() == [3, 4]
        assert trace.metadata["recording"] == {"id": "one", "ranks": [0, 1], "num_ranks": 2}
        assert trace.notes == (
            "rank 0 dropped 2 steps (3-4), its disk was slower than the steps",
            "rank 1 dropped 1 step (1): OSError: no room",
            "3 steps left out: not every rank recorded them",
        )
        files = [tmp_path / "one" / f"rank_{rank}.safetensors" for rank in (1, 0)]
        np.testing.assert_array_equal(LoadTrace.open(files).logical_count, trace.logical_count)

    def test_tokens_of_a_step_that_one_rank_dropped_are_left_out(self, tmp_path: Path) -> None:
        def ids_of(rank: int, step: int) -> np.ndarray:
            return np.full((step + 1, L, 2), (rank + step) % E)

        for rank, steps in ((0, [0, 1, 2, 3]), (1, [0, 2, 3])):
            description = replace(self.description(rank), tokens=True, top_k=2)
            sink = open_trace_file(str(tmp_path), "one", description, rank)
            for step in steps:
                ids = ids_of(rank, step)
                each = np.full(len(ids), step)
                sink.append(ids, forward_pass_ids=each, phases=each * 0 + 2, timestamps=each * 0.5)
            sink.close(self.report([[1, 1]] if rank else []))
        trace = LoadTrace.open(tmp_path / "one")
        assert trace.forward_pass_ids.tolist() == [0, 2, 3]
        expected = np.concatenate([ids_of(rank, step) for step in (0, 2, 3) for rank in (0, 1)])
        np.testing.assert_array_equal(trace.topk_ids, expected)
        assert trace.token_offsets is not None
        assert trace.token_offsets.tolist() == [0, 2, 8, 16]
        assert trace.logical_count.sum((1, 2)).tolist() == [2 * 2 * L, 6 * 2 * L, 8 * 2 * L]

    def test_a_rank_by_itself_says_that_it_is_one_of_two(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, 1, [0, 1], self.report([]))
        trace = LoadTrace.open(path)
        np.testing.assert_array_equal(trace.logical_count, [logical_of(100), logical_of(101)])
        assert "recorded by ranks 1 of 2" in trace.notes[0]

    def test_a_file_given_twice_is_not_counted_twice(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, 0, [0, 1], self.report([]))
        copy = path.with_name("copy.safetensors")
        copy.write_bytes(path.read_bytes())
        with pytest.raises(TraceError, match="2 recordings that are not of one run"):
            LoadTrace.open([path, copy])

    def test_a_crash_leaves_what_was_written(self, tmp_path: Path) -> None:
        self.write(tmp_path, 0, [0, 1, 2], None)
        path = self.write(tmp_path, 1, [0, 1, 2], self.report([]))
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 7)  # in the middle of a step
        trace = LoadTrace.open(tmp_path / "one")
        assert trace.forward_pass_ids.tolist() == [0, 1]
        assert "rank 0 did not close its file: how many steps it dropped is not known" in trace.notes
        assert any("3 records, 2 are whole" in note for note in trace.notes)

    def test_nothing_in_common_is_refused_by_the_names_of_the_files(self, tmp_path: Path) -> None:
        self.write(tmp_path, 0, [0, 1], self.report([]))
        self.write(tmp_path, 1, [2], self.report([]))
        with pytest.raises(TraceError, match=r"rank_0.safetensors and 1 more: no step was recorded by every rank"):
            LoadTrace.open(tmp_path / "one")

    def test_a_file_begins_to_be_one_before_the_first_step(self, tmp_path: Path) -> None:
        sink = open_trace_file(str(tmp_path), "one", self.description(0), 0)
        with pytest.raises(TraceError, match="holds no whole step"):
            LoadTrace.open(sink.path)

    def test_the_header_follows_about_each_second(self, tmp_path: Path) -> None:
        now, told = [0.0], []
        sink = TraceFileSink(tmp_path / "t", self.description(0), clock=lambda: now[0])
        for step in range(5):
            now[0] = 0.4 * step
            append(sink, [step], 0)
            told.append(read_safetensors_header(tmp_path / "t").tensors["steps"]["shape"][0])
        assert told == [0, 0, 0, 4, 4]
        assert LoadTrace.open(tmp_path / "t").forward_pass_ids.tolist() == [0, 1, 2, 3, 4]

    def test_errors_name_the_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ConfigError, match="cannot record into dump_dir") as caught:
            open_trace_file(str(tmp_path / "nowhere"), "one", self.description(0), 0)
        assert caught.value.field == "dump_dir"
        self.write(tmp_path, 0, [0], self.report([]))
        with pytest.raises(ConfigError, match="exists"):
            self.write(tmp_path, 0, [0], self.report([]))
        monkeypatch.setattr("equipoise.load.stream_file.MAX_RECORDINGS", 1)
        (tmp_path / "expert_distribution_x").mkdir()
        with pytest.raises(StorageError, match="holds 1 streamed recordings, at most 1 are kept"):
            open_trace_file(str(tmp_path), "expert_distribution_y", self.description(0), 0)
        assert not (tmp_path / "expert_distribution_y").exists()

    def test_the_worst_report_fits_into_the_header(self, tmp_path: Path) -> None:
        far = [[10**18 + 2 * i, 10**18 + 2 * i] for i in range(2 * MAX_RANGES)]
        path = self.write(tmp_path, 0, [0], self.report(far, 'a "quoted" é\n' * 400), num_ranks=1)
        assert "dropped" in LoadTrace.open(path).notes[0]


class TestTokens:
    """A ring of tokens, held against lists of what each step routed."""

    K = 2

    def new_stream(self, sink: SlowDisk, num_staged: int, max_records: int = 10_000) -> TokenStream:
        given = {"num_staged": num_staged, "max_records": max_records, "device": torch.device("cpu")}
        return TokenStream(L, self.K, sink, dtype=torch.int16, **given)  # type: ignore[arg-type]

    @staticmethod
    def route(stream: TokenStream, topk_ids: np.ndarray, step: int, *, counted: bool = True) -> None:
        """``topk_ids``: (tokens, L, K)."""
        for layer in range(L):
            stream.record_tokens(layer, torch.from_numpy(topk_ids[:, layer]))
        if counted:
            stream.add(physical_of(0), MAP, step, "decode")
        else:
            stream.discard()

    @given(st.lists(st.integers(0, 9), max_size=40), st.integers(4, 12), st.integers(0, 2**32 - 1))
    @settings(deadline=None, max_examples=40)
    def test_what_is_taken_is_written_whatever_lies_in_the_ring(
        self, sizes: list[int], num_staged: int, seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        disk = TokenDisk()
        disk.gate.set()
        stream = self.new_stream(disk, num_staged)
        routed = {}
        for step, size in enumerate(sizes):
            ids = rng.integers(-1, E, (size, L, self.K))
            if not rng.integers(0, 4):
                disk.gate.clear() if disk.gate.is_set() else disk.gate.set()
            counted = bool(rng.integers(0, 5))
            self.route(stream, ids, step, counted=counted)
            if counted:
                routed[step] = ids if size else np.full((1, L, self.K), -1)
        disk.gate.set()
        report = end(stream)
        gone = set(routed) - set(disk.steps)
        assert report.num_dropped == len(gone)
        assert report.num_written == len(disk.steps) == len(routed) - len(gone)
        assert all(any(first <= step <= last for first, last in report.dropped) for step in gone)
        assert gone >= {step for step, ids in routed.items() if len(ids) > num_staged}
        for step, ids in disk.steps.items():
            assert np.array_equal(ids, routed[step]), step
        assert stream._num_taken == stream._num_released

    def test_a_full_ring_drops_steps_and_goes_on(self) -> None:
        disk = TokenDisk()
        stream = self.new_stream(disk, 8)
        ids = np.arange(8 * L * self.K).reshape(8, L, self.K) % E
        for step in range(5):
            self.route(stream, ids[:3], step)  # two fit
        assert (stream.report().num_steps, stream.report().dropped) == (2, [[2, 4]])
        disk.gate.set()
        until(lambda: stream.report().num_written == 2)
        until(lambda: stream._num_released == 6)
        self.route(stream, ids[:5], 5)  # lies at the beginning again
        report = end(stream)
        assert (report.num_written, report.num_dropped) == (3, 3)
        assert np.array_equal(disk.steps[5], ids[:5])


class TokenDisk(SlowDisk):
    """Takes tokens, a list of each step's."""

    def append(
        self, values: np.ndarray, *, forward_pass_ids: np.ndarray, phases: np.ndarray, timestamps: np.ndarray
    ) -> None:
        assert self.gate.wait(20)
        assert len(values) == len(phases) == len(timestamps)
        for step in np.unique(forward_pass_ids).tolist():
            self.steps[step] = values[forward_pass_ids == step].copy()
