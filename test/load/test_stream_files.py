"""Files of streamed recordings: what the ranks wrote is summed, and what is missing is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from equipoise.errors import ConfigError, StorageError, TraceError
from equipoise.formats.container import read_safetensors_header
from equipoise.formats.trace_file import TraceDescription
from equipoise.load.stream_file import TraceFileSink, open_trace_file
from equipoise.load.stream_report import MAX_RANGES, StreamReport
from equipoise.load.trace import LoadTrace
from helpers.streamed_steps import E, L, append, logical_of


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
