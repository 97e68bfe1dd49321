"""Steps written in the background: what is taken is written, what is dropped is told, and no step ever waits."""

from __future__ import annotations

import errno
import threading
import time

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.load.step_stream import CountStream, TokenStream
from equipoise.load.stream_report import MAX_RANGES, DroppedSteps, StreamReport
from helpers.streamed_steps import MAP, E, L, logical_of, physical_of


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


def add(stream: CountStream, *steps: int) -> None:
    for step in steps:
        stream.add(physical_of(step), MAP, step, "decode")


def end(stream: CountStream) -> StreamReport:
    stream.stop()
    stream.join(20)
    return stream.report()


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
