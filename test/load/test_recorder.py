import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.distributed.in_memory import InMemoryCommunicator, InMemoryHub
from equipoise.errors import ConfigError, LoadError, PhaseError, StorageError
from equipoise.load.recorder import ExpertDistributionRecorder
from equipoise.load.recording import LoadSnapshot, write_dump
from equipoise.load.trace import LoadTrace
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology

L, P, E = 2, 6, 4
MAP = torch.tensor([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 0, 0]])
OTHER_MAP = torch.tensor([[3, 2, 1, 0, 3, 3], [0, 1, 2, 3, 1, 1]])
METADATA = ExpertLocationMetadata.from_physical_to_logical(MAP, E, EpTopology(2, 1, 3), max_replicas=3)


def new_recorder(communicator: InMemoryCommunicator | None = None, **given: Any) -> ExpertDistributionRecorder:
    options = {"period": 12, "num_windows": 3, "buffer_size": 4, "keep_physical": True, **given}
    return ExpertDistributionRecorder(METADATA, communicator or InMemoryHub(1).communicator(0), **options)


def logical(physical: np.ndarray, p2l: torch.Tensor) -> np.ndarray:
    """The oracle: (L, P) counts to (L, E), one slot at a time."""
    out = np.zeros((L, E), dtype=np.int64)
    for layer in range(L):
        for slot in range(P):
            out[layer, p2l[layer, slot]] += physical[layer, slot]
    return out


def count_a_step(recorder: ExpertDistributionRecorder, rng: np.random.Generator) -> np.ndarray:
    physical = np.zeros((L, P), dtype=np.int64)
    for layer in range(L):
        slots = rng.integers(-1, P, (3, 2))
        recorder.record(layer, torch.from_numpy(slots))
        for slot in slots[slots >= 0]:
            physical[layer, slot] += 1
    return physical


@given(st.integers(1, 5), st.integers(0, 12), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=40)
def test_a_recording_holds_the_last_counted_steps_through_the_map_of_their_time(
    size: int, steps: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    recorder, expected, ids = new_recorder(buffer_size=size), [], []
    recorder.start_record()
    for step in range(steps):
        p2l = MAP if rng.random() < 0.5 else OTHER_MAP
        counted = bool(rng.random() < 0.7)
        physical = count_a_step(recorder, rng)
        recorder.end_step(p2l, forward_pass_id=step, counted=counted)
        if counted:
            expected.append((physical, logical(physical, p2l)))
            ids.append(step)
    if not ids:
        with pytest.raises(PhaseError):
            recorder.snapshot()
        return
    snapshot = recorder.snapshot()
    kept = expected[-size:]
    assert snapshot.forward_pass_ids == tuple(ids[-size:])
    assert snapshot.logical_count.shape == (len(kept), L, E)
    for row, (physical, per_expert) in enumerate(kept):
        assert snapshot.logical_count[row].tolist() == per_expert.tolist()
        assert snapshot.physical_count is not None
        assert snapshot.physical_count[row].tolist() == physical.tolist()


@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 150), st.integers(1, 60), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_windows_are_the_last_steps_in_a_few_even_groups(
    period: int, num_windows: int, steps: int, asked: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    recorder = new_recorder(period=period, num_windows=num_windows)
    expected = []
    for step in range(steps):
        p2l = MAP if rng.random() < 0.5 else OTHER_MAP
        expected.append(logical(count_a_step(recorder, rng), p2l))
        recorder.end_step(p2l, forward_pass_id=step, counted=True)
    for last in (asked, None):
        covered = recorder.window_steps(last)
        windows = recorder.windows(num_windows, last)
        assert len(windows) <= num_windows
        assert bool(len(windows)) == bool(steps)
        total = np.sum(expected[steps - covered :], axis=0) if covered else np.zeros((L, E))
        assert windows.sum(0).tolist() == total.tolist() or not steps
    assert recorder.window_steps() >= min(steps, period), "the whole period can be looked back on"
    assert recorder.window_steps(asked) >= min(steps, asked, period)
    longest = max(1, -(-period // num_windows)) * 2
    assert recorder.window_steps(asked) <= asked + longest, "and not much more than asked for"


def test_early_on_every_step_is_seen_by_itself() -> None:
    recorder = new_recorder(period=1000, num_windows=8)
    for step in range(8):
        recorder.record(0, torch.full((step + 1, 1), 2))
        recorder.end_step(MAP, forward_pass_id=step, counted=True)
    assert recorder.windows(8)[:, 0, 2].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert recorder.windows(8, 3)[:, 0, 2].tolist() == [6, 7, 8]


def test_windows_keep_their_order_and_evenness_over_many_steps() -> None:
    recorder = new_recorder(period=1000, num_windows=8)
    for step in range(3000):
        recorder.record(0, torch.full((1, 1), 2) if step >= 2500 else torch.full((1, 1), 3))
        recorder.end_step(MAP, forward_pass_id=step, counted=True)
    windows = recorder.windows(8)
    assert 1000 <= recorder.window_steps() < 1000 + 128
    assert windows[:, 0].sum(1).max() <= 2 * 128
    assert windows[:, 0, 2].sum() == 500
    assert windows[0, 0, 2] == 0, "oldest first"
    assert windows[-1, 0, 3] == 0


def test_start_and_stop_leave_the_planners_window_alone() -> None:
    recorder = new_recorder(keep_physical=False)
    one = torch.zeros(1, 1, dtype=torch.int64)

    def step(number: int) -> None:
        recorder.record(0, one)
        recorder.end_step(MAP, forward_pass_id=number, counted=True)

    with pytest.raises(PhaseError, match="no recording runs"):
        recorder.stop_record()
    recorder.start_record()
    step(0)
    recorder.stop_record()
    step(1)
    assert not recorder.recording
    for _ in range(2):  # reading takes nothing away
        snapshot = recorder.snapshot()
        assert (snapshot.forward_pass_ids, snapshot.physical_count) == ((0,), None)
    recorder.start_record()
    assert recorder.recording
    with pytest.raises(PhaseError, match="nothing was recorded"):
        recorder.snapshot()
    step(2)
    assert recorder.snapshot().forward_pass_ids == (2,), "an earlier recording is dropped"
    assert recorder.windows(3)[:, 0, 0].sum() == recorder.window_steps() == 3


def test_a_step_that_does_not_count_leaves_nothing_behind() -> None:
    recorder = new_recorder()
    recorder.record(0, torch.zeros(5, 1, dtype=torch.int64))
    recorder.end_step(MAP, forward_pass_id=0, counted=False)
    recorder.end_step(MAP, forward_pass_id=1, counted=True)
    assert recorder.windows(1).sum() == 0
    assert recorder.window_steps() == 1


@given(st.integers(0, 2**32 - 1), st.sampled_from([torch.int32, torch.int64]))
@settings(deadline=None, max_examples=20)
def test_counts_of_the_host_are_as_good_as_ids(seed: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(seed)
    by_ids, by_counts = new_recorder(), new_recorder()
    for step in range(3):
        physical = torch.from_numpy(count_a_step(by_ids, rng)).to(dtype)
        first = physical // 2
        by_counts.record_counts(first)
        by_counts.record_counts(physical - first)
        for recorder in (by_ids, by_counts):
            recorder.end_step(MAP, forward_pass_id=step, counted=True)
    assert by_ids.windows(3).tolist() == by_counts.windows(3).tolist()


def test_counts_of_another_shape_are_refused() -> None:
    recorder = new_recorder()
    with pytest.raises(LoadError, match=r"\(2, 6\), got \(2, 5\)") as caught:
        recorder.record_counts(torch.zeros(2, 5, dtype=torch.int32))
    assert caught.value.field == "physical_counts"


@pytest.mark.parametrize(("world_size", "replicated"), [(2, False), (3, False), (3, True)])
def test_ranks_are_summed_in_one_reduction_only_when_asked(world_size: int, replicated: bool) -> None:
    hub = InMemoryHub(world_size)
    calls = [0] * world_size
    results: list[torch.Tensor | None] = [None] * world_size

    def rank_main(rank: int) -> None:
        communicator = hub.communicator(rank)
        reduce: Callable[..., None] = communicator.all_reduce_sum_

        def counting(tensor: torch.Tensor, timeout: float = 60.0) -> None:
            calls[rank] += 1
            reduce(tensor, timeout)

        communicator.all_reduce_sum_ = counting  # type: ignore[method-assign]
        recorder = new_recorder(communicator, replicated=replicated)
        recorder.start_record()
        for step in range(3):
            recorder.record(0, torch.full((world_size if replicated else rank + 1, 1), 2))
            recorder.end_step(MAP, forward_pass_id=step, counted=True)
        assert calls[rank] == 0
        results[rank] = recorder.snapshot().logical_count

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    total = world_size if replicated else world_size * (world_size + 1) // 2
    for rank in range(world_size):
        assert calls[rank] == (0 if replicated else 1)
        assert results[rank] is not None
        assert results[rank][:, 0, 2].tolist() == [total] * 3


def one_step() -> LoadSnapshot:
    recorder = new_recorder()
    recorder.start_record()
    recorder.record(0, torch.zeros(1, 1, dtype=torch.int64))
    recorder.end_step(MAP, forward_pass_id=3, counted=True)
    return recorder.snapshot()


def test_dumps_are_bounded_in_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("equipoise.load.recording.MAX_DUMPS", 2)
    (tmp_path / "something_else.npz").touch()
    for second in range(2):
        assert write_dump(one_step(), METADATA, [4, 5], str(tmp_path), float(second)).exists()
    with pytest.raises(StorageError, match="holds 2 dumps, at most 2 are kept"):
        write_dump(one_step(), METADATA, [4, 5], str(tmp_path), 2.0)
    assert len(list(tmp_path.glob("expert_*"))) == 2


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, StorageError), (errno.EACCES, ConfigError)])
def test_a_full_disk_is_no_mistake_of_the_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type
) -> None:
    def full(_trace: LoadTrace, _path: Path) -> None:
        raise OSError(number, "as the system says")

    monkeypatch.setattr(LoadTrace, "save", full)
    with pytest.raises(kind, match="as the system says"):
        write_dump(one_step(), METADATA, [4, 5], str(tmp_path), 0.0)


def test_a_dump_names_layers_as_the_host_does(tmp_path: Path) -> None:
    trace = LoadTrace.open(write_dump(one_step(), METADATA, [4, 5], str(tmp_path), 0.0))
    assert trace.metadata["layer_ids"] == [4, 5]
