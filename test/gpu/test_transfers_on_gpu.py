"""What only a GPU can settle of transfers, on one of them: checksums, every slot, passes that read while layers commit.

Two ranks cannot share a GPU over NCCL ("Duplicate GPU detected"); threads and processes can, over pinned host memory.
Each test notes its figures with ``record_property``.
"""

from __future__ import annotations

import time
from datetime import timedelta
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from equipoise.distributed.communicator import TorchCommunicator
from equipoise.distributed.in_memory import InMemoryHub
from equipoise.distributed.pinned_host import PinnedHostCommunicator
from equipoise.errors import TransferError
from equipoise.topology import EpTopology
from equipoise.transfer.execution.runner import TransferState
from equipoise.transfer.execution.stream import SideStream
from equipoise.transfer.execution.updater import ExpertLocationUpdater
from equipoise.transfer.execution.worker import TransferWorker
from equipoise.transfer.memory.verification import checksum
from equipoise.transfer.planning.plan import plan_transfer
from helpers.faults import Fault, FaultyCommunicator, ScheduledFaults
from helpers.migrate import migrate_layer
from helpers.placements import live_weights, perturbed, pooled, random_map, rank_weights, same_bytes
from helpers.run_ranks import run_ranks
from helpers.run_threads import results_of

TOPOLOGY = EpTopology(4, 2, 3)
SPECS = (
    (torch.bfloat16, (70, 70)),
    (torch.float8_e4m3fn, (20_000,)),
    (torch.int32, (9,)),
    (torch.uint8, (3,)),
)


def cuda(weights: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    return [[tensor.cuda() for tensor in tensors] for tensors in weights]


def over_host(communicator: Any) -> PinnedHostCommunicator:
    return PinnedHostCommunicator(communicator, torch.device("cuda", 0))


@pytest.mark.gpu
@pytest.mark.timeout(60)
def test_the_device_computes_the_same_checksum() -> None:
    generator = torch.Generator().manual_seed(1)
    for size in (*range(1, 100), 511, 44 << 20):
        row = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        assert checksum([row.cuda()]) == checksum([row]), size


@pytest.mark.gpu
@pytest.mark.timeout(120)
@pytest.mark.parametrize("in_a_pool", [False, True])
@pytest.mark.parametrize("verification", ["off", "canary", "checksum"])
def test_every_slot_holds_what_the_plan_says(verification: Any, in_a_pool: bool) -> None:
    rng = np.random.default_rng(7)
    placements = [random_map(rng, 9, TOPOLOGY, 2)]
    for _ in range(6):
        placements.append(perturbed(rng, random_map(rng, 9, TOPOLOGY, 2), 9))

    def body(communicator: Any) -> None:
        torch.cuda.set_device(0)
        weights: Any = cuda(rank_weights(placements[0], communicator.rank, TOPOLOGY, SPECS))
        weights = (
            on_gpu(pooled(rank_weights(placements[0], communicator.rank, TOPOLOGY, SPECS), 3)) if in_a_pool else weights
        )
        updater = ExpertLocationUpdater(
            over_host(communicator), TOPOLOGY, weights, verification=verification, rounds_in_flight=4
        )
        updater.warm_up()
        staged = updater.max_staged_experts
        for old, new in pairwise(placements):
            plan = plan_transfer(old, new, TOPOLOGY, num_logical_experts=9, max_staged_experts=staged)
            updater.agree_on(plan)
            for layer in plan.layers:
                migrate_layer(updater, layer)
            expected = rank_weights(new, communicator.rank, TOPOLOGY, SPECS)
            for tensors, right in zip(live_weights(weights), expected, strict=True):
                assert all(same_bytes(a.cpu(), b) for a, b in zip(tensors, right, strict=True))

    results_of(body, 4)


def on_gpu(pool: Any) -> Any:
    from equipoise.transfer.memory.pool import ExpertPool

    return ExpertPool([tensor.cuda() for tensor in pool.tensors], pool.num_layers, pool.slots_per_rank)


@pytest.mark.gpu
@pytest.mark.timeout(180)
@pytest.mark.parametrize("with_event", [True, False], ids=["as-is", "without-the-event"])
def test_forward_passes_never_read_half_a_layer(with_event: bool, monkeypatch: Any, record_property: Any) -> None:
    """A race hunt. Without the event that orders staging behind commits it must find one, or it proves nothing."""
    if not with_event:
        monkeypatch.setattr(SideStream, "overlapped", lambda self: torch.cuda.stream(self._stream))
    hub, old = InMemoryHub(4), np.arange(12)[None]
    placements = [np.roll(old, shift, axis=1) for shift in range(0, 12, 3)]

    def body(communicator: Any) -> int:
        torch.cuda.set_device(0)
        with torch.cuda.stream(torch.cuda.Stream()):
            rows = [torch.full((1 << 18,), expert, dtype=torch.int64) for expert in range(12)]
            slots = TOPOLOGY.slots_of_rank(communicator.rank)
            live = old.copy()
            weights = [[torch.stack([rows[expert] for expert in live[0, slots.start : slots.stop]]).cuda()]]
            updater = ExpertLocationUpdater(
                over_host(hub.communicator(communicator.rank)), TOPOLOGY, weights, verification="off"
            )
            runner = TransferWorker(updater)
            checks = []

            def apply(layer_id: int, batch: Any) -> None:
                live[layer_id] = batch.new_map

            for number in range(50):
                target = placements[(number + 1) % 4]
                runner.start(plan_transfer(live, target, TOPOLOGY))
                while runner.active:
                    torch.cuda._sleep(5_000_000)
                    checks.append((live[0, slots.start : slots.stop].copy(), weights[0][0].sum(1)))
                    if runner.poll(communicator) == TransferState.READY:
                        torch.cuda._sleep(10_000_000)  # the commit is queued long before it runs
                        runner.commit(apply)
            runner.close()
            torch.cuda.synchronize()
            return sum((found.cpu() != torch.as_tensor(held) * (1 << 18)).any().item() for held, found in checks)

    wrong = sum(results_of(body, 4, timeout=170.0))
    record_property("wrong reads", wrong)
    assert (wrong == 0) is with_event


def _two_processes(rank: int, _world_size: int) -> dict[str, Any]:
    torch.cuda.set_device(0)
    topology = EpTopology(2, 1, 3)
    old, new = np.arange(6)[None], np.roll(np.arange(6), 3)[None]
    gloo = lambda: dist.new_group(backend="gloo", timeout=timedelta(seconds=60))  # noqa: E731
    inner = TorchCommunicator(gloo(), control_group=gloo(), new_group=gloo, new_control_group=gloo)
    host = PinnedHostCommunicator(inner, torch.device("cuda", 0))
    faults = ScheduledFaults([], rank)
    specs = ((torch.bfloat16, (4 << 20,)), (torch.int32, (5,)))
    weights = cuda(rank_weights(old, rank, topology, specs))
    updater = ExpertLocationUpdater(
        FaultyCommunicator(host, faults), topology, weights, verification="checksum", timeout=3.0, vote_grace=3.0
    )
    start = time.perf_counter()
    updater.warm_up()
    warm_up_seconds = time.perf_counter() - start
    outcomes = []
    for kind in ("drop", "corrupt", "raise", None):
        faults.schedule([Fault(kind, 1, "transfer")] if kind else [])  # type: ignore[arg-type]
        start = time.perf_counter()
        try:
            migrate_layer(updater, plan_transfer(old, new, topology).layers[0])
            outcomes.append("committed")
        except TransferError as error:
            outcomes.append(type(error).__name__)
        seconds = time.perf_counter() - start
        expected = rank_weights(new if kind is None else old, rank, topology, specs)[0]
        assert all(same_bytes(a.cpu(), b) for a, b in zip(weights[0], expected, strict=True))
    return {
        "outcomes": outcomes,
        "pinned MiB": host.host_bytes >> 20,
        "warm-up seconds": round(warm_up_seconds, 2),
        "GB/s": round(3 * (8 << 20) / seconds / 1e9, 2),
    }


@pytest.mark.gpu
@pytest.mark.timeout(120)
def test_two_processes_over_the_host(record_property: Any) -> None:
    """The only real two-rank rebuild on CUDA that one GPU allows."""
    first, second = run_ranks(_two_processes, 2, timeout=100)
    assert first["outcomes"] == second["outcomes"]
    assert first["outcomes"][1] == "VerificationError"
    assert first["outcomes"][-1] == "committed"
    for name, figure in first.items():
        record_property(name, figure)
