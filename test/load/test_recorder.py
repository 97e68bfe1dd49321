import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.distributed.in_memory import InMemoryCommunicator, InMemoryHub
from equipoise.load.recorder import ExpertDistributionRecorder

L, P, E = 2, 6, 4
MAP = torch.tensor([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 0, 0]])
OTHER_MAP = torch.tensor([[3, 2, 1, 0, 3, 3], [0, 1, 2, 3, 1, 1]])


def new_recorder(buffer_size: int = 4, keep_physical: bool = True) -> ExpertDistributionRecorder:
    recorder = ExpertDistributionRecorder(L, P, E, buffer_size=buffer_size, device="cpu", keep_physical=keep_physical)
    recorder.start()
    return recorder


def alone() -> InMemoryCommunicator:
    return InMemoryHub(1).communicator(0)


def logical(physical: np.ndarray, p2l: torch.Tensor) -> np.ndarray:
    """The oracle: (L, P) counts to (L, E), one slot at a time."""
    out = np.zeros((L, E), dtype=np.int64)
    for layer in range(L):
        for slot in range(P):
            out[layer, p2l[layer, slot]] += physical[layer, slot]
    return out


@given(st.integers(1, 5), st.integers(0, 12), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=40)
def test_the_ring_holds_the_last_counted_steps_through_the_map_of_their_time(size: int, steps: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    recorder, expected, ids = new_recorder(size), [], []
    for step in range(steps):
        p2l = MAP if rng.random() < 0.5 else OTHER_MAP
        counted = bool(rng.random() < 0.7)
        physical = np.zeros((L, P), dtype=np.int64)
        for layer in range(L):
            slots = rng.integers(-1, P, (3, 2))
            recorder.record(layer, torch.from_numpy(slots))
            for slot in slots[slots >= 0]:
                physical[layer, slot] += 1
        recorder.end_step(p2l, forward_pass_id=step, counted=counted)
        if counted:
            expected.append((physical, logical(physical, p2l)))
            ids.append(step)
    snapshot = recorder.snapshot(alone())
    kept = expected[-size:]
    assert snapshot.forward_pass_ids == tuple(ids[-size:])
    assert snapshot.logical_count.shape == (len(kept), L, E)
    for row, (physical, per_expert) in enumerate(kept):
        assert snapshot.logical_count[row].tolist() == per_expert.tolist()
        assert snapshot.physical_count is not None
        assert snapshot.physical_count[row].tolist() == physical.tolist()
    windows = recorder.windows(alone(), num_windows=3, last=10**6)
    assert len(windows) == min(3, len(kept))
    assert windows.sum(0).tolist() == sum((k[1] for k in kept), np.zeros((L, E), dtype=np.int64)).tolist() or not kept


def test_start_stop_snapshot_and_reset_are_separate() -> None:
    recorder = new_recorder(keep_physical=False)
    one = torch.zeros(1, 1, dtype=torch.int64)

    def step(number: int) -> None:
        recorder.record(0, one)
        recorder.end_step(MAP, forward_pass_id=number, counted=True)

    step(0)
    recorder.stop()
    step(1)
    assert not recorder.recording
    for _ in range(2):  # reading takes nothing away
        assert recorder.snapshot(alone()).forward_pass_ids == (0,)
    recorder.start()
    step(2)
    assert recorder.snapshot(alone()).forward_pass_ids == (0, 2)
    recorder.reset()
    assert recorder.recording
    assert recorder.snapshot(alone()).logical_count.shape == (0, L, E)
    assert recorder.windows(alone(), num_windows=2, last=5).shape == (0, L, E)


def test_tokens_counted_before_a_start_do_not_leak_into_the_first_step() -> None:
    recorder = new_recorder()
    recorder.record(0, torch.zeros(5, 1, dtype=torch.int64))  # a step cut off by stop
    recorder.stop()
    recorder.start()
    recorder.end_step(MAP, forward_pass_id=0, counted=True)
    assert recorder.snapshot(alone()).logical_count.sum() == 0


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_are_summed_in_one_reduction_only_when_asked(world_size: int) -> None:
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
        recorder = new_recorder()
        for step in range(3):
            recorder.record(0, torch.full((rank + 1, 1), 2))
            recorder.end_step(MAP, forward_pass_id=step, counted=True)
        assert calls[rank] == 0
        results[rank] = recorder.snapshot(communicator).logical_count

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    total = world_size * (world_size + 1) // 2
    for rank in range(world_size):
        assert calls[rank] == 1
        assert results[rank] is not None
        assert results[rank][:, 0, 2].tolist() == [total] * 3
