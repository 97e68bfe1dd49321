"""A streamed recording on real ranks, held against counts made in one process, with a disk that keeps up and one that
does not."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from equipoise.config import EplbConfig
from equipoise.distributed.communicator import TorchCommunicator
from equipoise.errors import ConfigError, EquipoiseError, PhaseError
from equipoise.formats.trace_file import TraceDescription
from equipoise.load.operator_recording import OperatorRecording
from equipoise.load.recorder import ExpertDistributionRecorder
from equipoise.load.step_writer import StepSink
from equipoise.load.stream_file import TraceFileSink, open_trace_file
from equipoise.load.trace import LoadTrace
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology
from helpers.run_ranks import run_ranks

L, P, E, STEPS, TOKENS = 2, 6, 4, 40, 5
MAPS = [torch.tensor([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 0, 0]]), torch.tensor([[3, 2, 1, 0, 3, 3], [0, 1, 2, 3, 1, 1]])]


def slots_of(rank: int, step: int) -> torch.Tensor:
    """(L, TOKENS, 2): what a rank routes in a step."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randint(-1, P, (L, TOKENS, 2), generator=generator)


def map_of(step: int) -> torch.Tensor:
    return MAPS[step >= STEPS // 2]


def load_of(rank: int, step: int) -> np.ndarray:
    """(L, E), one choice at a time."""
    load = np.zeros((L, E), np.int64)
    for layer, row in enumerate(slots_of(rank, step).tolist()):
        for slot in (slot for token in row for slot in token if slot >= 0):
            load[layer, map_of(step)[layer, slot]] += 1
    return load


class SlowFile(TraceFileSink):
    def append(self, values: np.ndarray, **given: Any) -> None:
        time.sleep(0.1)
        super().append(values, **given)


def open_slow_file(directory: str, name: str, description: TraceDescription, rank: int) -> StepSink:
    Path(directory, name).mkdir(exist_ok=True)
    return SlowFile(Path(directory, name, f"rank_{rank}.safetensors"), description)


def break_down(*_given: Any) -> StepSink:
    raise RuntimeError("no memory")


def refuse(_directory: str, _name: str, _description: TraceDescription, _rank: int) -> StepSink:
    raise ConfigError("this rank has no disk", field="dump_dir")


class Rank:
    def __init__(self, rank: int, world_size: int, slow: tuple[int, ...] = (), broken: tuple[int, ...] = ()) -> None:
        self.rank = rank
        config = EplbConfig(expert_distribution_stream_buffer_size=4 if rank in slow else 64)
        topology = EpTopology(world_size, 1, P // world_size)
        metadata = ExpertLocationMetadata.from_physical_to_logical(MAPS[0], E, topology, max_replicas=3)
        communicator = TorchCommunicator(dist.group.WORLD)
        self.recorder = ExpertDistributionRecorder.from_config(
            config, metadata, communicator, num_windows=8, replicated=False
        )
        open_sink = refuse if rank in broken else open_slow_file if rank in slow else open_trace_file
        self.recording = OperatorRecording(config, self.recorder, metadata, [3, 4], communicator, open_sink=open_sink)

    def step(self, step: int) -> float:
        """Seconds that the end of a step took."""
        self.recorder.begin_step("prefill" if step == 0 else "decode", 0)
        for layer, slots in enumerate(slots_of(self.rank, step)):
            self.recorder.record(layer, slots)
        began = time.perf_counter()
        self.recorder.end_step(map_of(step), forward_pass_id=step, counted=step != 7)
        return time.perf_counter() - began

    def finish(self) -> Any:
        """Every rank asks as often as the others."""
        reply = self.recording.stop()
        while not reply.stream.finished:
            time.sleep(0.02)
            reply = self.recording.describe()
        return reply


def record(rank: int, world_size: int, directory: str, slow: tuple[int, ...]) -> Any:
    ours = Rank(rank, world_size, slow)
    ours.step(STEPS)  # before the recording
    ours.recording.start("per_pass", directory, "run")
    longest = max(ours.step(step) for step in range(STEPS))
    reply = ours.finish()
    ours.step(STEPS + 1)
    with pytest.raises(PhaseError, match="no recording runs"):
        ours.recording.stop()
    return longest, reply


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_trace_is_what_all_ranks_routed_step_by_step(tmp_path: Path, world_size: int) -> None:
    results = run_ranks(record, world_size, str(tmp_path), ())
    replies = [reply for _, reply in results]
    assert replies == [replies[0]] * world_size
    stream = replies[0].stream
    assert (replies[0].recording, stream.path, stream.mode, stream.finished) == (
        False,
        f"{tmp_path}/run",
        "per_pass",
        True,
    )
    trace = LoadTrace.open(stream.path)
    steps = [step for step in range(STEPS) if step != 7]  # which did not count
    assert trace.forward_pass_ids.tolist() == steps
    expected = np.array([[load_of(rank, step) for rank in range(world_size)] for step in steps])
    np.testing.assert_array_equal(trace.rank_count, expected)
    np.testing.assert_array_equal(trace.logical_count, expected.sum(1))
    assert trace.phases is not None
    assert trace.phases.tolist() == [1] + [2] * (len(steps) - 1)
    assert (trace.layer_ids.tolist(), trace.metadata["num_ranks"], trace.notes) == ([3, 4], world_size, ())


def test_a_slow_disk_of_one_rank_costs_steps_and_no_time(tmp_path: Path) -> None:
    results = run_ranks(record, 2, str(tmp_path), (1,))
    assert max(longest for longest, _ in results) < 0.1, "a step waited for the disk"
    fast, slow = results[0][1].stream.ranks
    assert (fast.num_written, fast.num_dropped) == (STEPS - 1, 0)
    assert slow.num_written + slow.num_dropped == STEPS - 1
    assert 4 <= slow.num_written < STEPS - 1
    trace = LoadTrace.open(results[0][1].stream.path)
    kept = trace.forward_pass_ids.tolist()
    assert len(kept) == slow.num_written
    gone = {step for first, last in slow.dropped for step in range(first, last + 1)}
    assert not gone & set(kept)
    np.testing.assert_array_equal(trace.logical_count, [load_of(0, step) + load_of(1, step) for step in kept])
    assert any(f"rank 1 dropped {slow.num_dropped} steps" in note for note in trace.notes)


def tokens_of(rank: int, step: int) -> np.ndarray:
    """(tokens, L, K) logical experts that a rank routes in a step; some steps have none of one rank's."""
    rng = np.random.default_rng(1000 * rank + step)
    return rng.integers(0, E, ((step + rank) % 4, L, 2))


def record_tokens(rank: int, world_size: int, directory: str) -> Any:
    ours = Rank(rank, world_size)
    with pytest.raises(PhaseError, match="no token was routed yet"):
        ours.recording.start("per_token", directory, "run")
    for step in range(STEPS):
        # As the embedded engine calls it: every rank with the tokens of all.
        tokens = [tokens_of(each, step) for each in range(world_size)]
        bounds = np.cumsum([0, *(len(each) for each in tokens)]).tolist()
        for layer in range(L):
            ids = torch.from_numpy(np.concatenate(tokens)[:, layer])
            ours.recorder.record_routed(layer, ids, ids[bounds[rank] : bounds[rank + 1]], bounds)
        ours.recorder.end_step(map_of(step), forward_pass_id=step, counted=step != 7)
        if step == 0:
            ours.recording.start("per_token", directory, "run")
    return ours.finish()


def test_tokens_of_all_ranks_come_back_in_their_steps(tmp_path: Path) -> None:
    stream = run_ranks(record_tokens, 3, str(tmp_path))[0].stream
    steps = [step for step in range(1, STEPS) if step != 7]
    assert (stream.mode, [rank.num_written for rank in stream.ranks]) == ("per_token", [len(steps)] * 3)
    trace = LoadTrace.open(stream.path)
    assert trace.forward_pass_ids.tolist() == steps
    assert trace.topk_ids is not None
    assert trace.token_offsets is not None
    for index, step in enumerate(steps):
        expected = np.concatenate([tokens_of(rank, step) for rank in range(3)])
        found = trace.topk_ids[trace.token_offsets[index] : trace.token_offsets[index + 1]]
        np.testing.assert_array_equal(found, expected)
        for layer in range(L):
            counts = np.bincount(expected[:, layer].ravel(), minlength=E)
            assert trace.logical_count[index, layer].tolist() == counts.tolist()
    assert (trace.metadata["top_k"], trace.layer_ids.tolist(), trace.notes) == (2, [3, 4], ())


def die_in_the_middle(rank: int, world_size: int, directory: str) -> None:
    ours = Rank(rank, world_size)
    ours.recording.start("per_pass", directory, "run")
    stream = ours.recorder.stream
    assert stream is not None
    for step in range(6):
        ours.step(step)
    while stream.report().num_written < 6:
        time.sleep(0.01)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ours.recording.close()


def test_a_rank_that_is_killed_leaves_what_it_wrote(tmp_path: Path) -> None:
    run_ranks(die_in_the_middle, 2, str(tmp_path), may_die=(1,))
    trace = LoadTrace.open(tmp_path / "run")
    assert trace.forward_pass_ids.tolist() == list(range(6))
    np.testing.assert_array_equal(trace.logical_count, [load_of(0, step) + load_of(1, step) for step in range(6)])
    assert any("rank 1 did not close its file" in note for note in trace.notes)


def refuse_on_one_rank(rank: int, world_size: int, directory: str) -> Any:
    ours = Rank(rank, world_size, broken=(1,))
    with pytest.raises(ConfigError, match="this rank has no disk") as caught:
        ours.recording.start("per_pass", directory, "run")
    assert caught.value.field == "dump_dir"
    assert not ours.recording.running
    ours.recording._open_sink = break_down if rank == 1 else open_trace_file  # type: ignore[assignment]
    with pytest.raises(EquipoiseError, match="rank 1 cannot record: RuntimeError: no memory"):
        ours.recording.start("per_pass", directory, "run")
    ours.recording.start(None, directory, "")
    ours.step(0)
    return ours.recording.snapshot().logical_count


def test_a_rank_that_cannot_write_keeps_all_from_recording_and_nothing_is_left(tmp_path: Path) -> None:
    counts, _ = run_ranks(refuse_on_one_rank, 2, str(tmp_path))
    assert counts[0].tolist() == (load_of(0, 0) + load_of(1, 0)).tolist()
    assert list(tmp_path.iterdir()) == []


def one_after_the_other(rank: int, world_size: int, directory: str) -> Any:
    ours = Rank(rank, world_size, slow=(0, 1))
    ours.recording.start(None, directory, "")
    ours.step(0)
    first = ours.recording.start("per_pass", directory, "first").stream
    ours.step(1)
    with pytest.raises(PhaseError, match="is streamed"):
        ours.recording.snapshot()
    ours.recording.start("per_pass", directory, "second")
    ours.step(2)
    ours.recording.close()  # as when the process ends
    assert ours.recording.describe().stream.finished
    with pytest.raises(ConfigError, match="name must be that of a folder"):
        ours.recording.start("per_pass", directory, "../elsewhere")
    return first


def test_a_recording_ends_the_one_before_it_and_the_end_of_the_process_closes_its_file(tmp_path: Path) -> None:
    first = run_ranks(one_after_the_other, 2, str(tmp_path))[0]
    assert not first.finished
    for name, step in (("first", 1), ("second", 2)):
        trace = LoadTrace.open(tmp_path / name)
        assert (trace.forward_pass_ids.tolist(), trace.notes) == ([step], ())
        assert trace.logical_count[0].tolist() == (load_of(0, step) + load_of(1, step)).tolist()
