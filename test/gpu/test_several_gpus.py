"""What needs two GPUs: transfers over NCCL, a rebuild after a lost message, and where contexts are made."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from equipoise.distributed.communicator import TorchCommunicator
from equipoise.distributed.groups import new_transfer_group
from equipoise.errors import TransferError
from equipoise.topology import EpTopology
from equipoise.transfer.execution.runner import TransferState
from equipoise.transfer.execution.updater import ExpertLocationUpdater
from equipoise.transfer.execution.worker import TransferWorker
from equipoise.transfer.planning.plan import plan_transfer
from helpers.faults import Fault, FaultyCommunicator, ScheduledFaults
from helpers.placements import rank_weights, same_bytes
from helpers.run_ranks import run_ranks

SPECS = ((torch.bfloat16, (4 << 20,)), (torch.float32, (7,)))


def _over_nccl(rank: int, world_size: int) -> dict[str, Any]:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    topology = EpTopology(world_size, 1, 3)
    old = np.arange(3 * world_size)[None]
    new = np.roll(old, 3, axis=1)
    make = lambda: new_transfer_group("nccl", os.environ)  # noqa: E731
    gloo = lambda: dist.new_group(backend="gloo")  # noqa: E731
    host = TorchCommunicator(gloo())
    wire = TorchCommunicator(make(), device, control_group=gloo(), new_group=make, new_control_group=gloo)
    faults = ScheduledFaults([], rank)
    weights = [[tensor.to(device) for tensor in rank_weights(old, rank, topology, SPECS)[0]]]
    updater = ExpertLocationUpdater(
        FaultyCommunicator(wire, faults), topology, weights, verification="checksum", timeout=5.0, vote_grace=10.0
    )
    updater.warm_up()
    runner = TransferWorker(updater)
    live, outcomes, seconds = old.copy(), [], 0.0
    for kind in (None, "drop", "raise", None):
        faults.schedule([Fault(kind, 1, "transfer")] if kind else [])  # type: ignore[arg-type]
        target = new if np.array_equal(live, old) else old
        runner.start(plan_transfer(live, target, topology))
        start = time.perf_counter()
        try:
            while runner.active:
                weights[0][0].float().sum()  # a forward pass
                if runner.poll(host) == TransferState.READY:
                    runner.commit(lambda layer, batch: live.__setitem__(layer, batch.new_map))
            outcomes.append("committed")
        except TransferError as error:
            outcomes.append(type(error).__name__)
        seconds = time.perf_counter() - start
        expected = rank_weights(live, rank, topology, SPECS)[0]
        assert all(same_bytes(a.cpu(), b) for a, b in zip(weights[0], expected, strict=True))
    time.sleep(70)  # longer than a watchdog takes to end a process over an aborted communicator
    host.barrier()
    runner.close()
    return {"outcomes": outcomes, "GB/s": round(3 * (8 << 20) / seconds / 1e9, 2)}


@pytest.mark.gpu(count=2)
@pytest.mark.timeout(240)
def test_transfers_over_nccl_survive_what_is_lost(record_property: Any) -> None:
    """Settles A1 to A3 on a real wire."""
    results = run_ranks(_over_nccl, torch.cuda.device_count(), timeout=220)
    assert all(result["outcomes"] == results[0]["outcomes"] for result in results)
    assert [outcome == "committed" for outcome in results[0]["outcomes"]] == [True, False, False, True]
    record_property("GB/s", results[0]["GB/s"])


def _memory_on_gpu_0(rank: int, world_size: int) -> int:
    torch.cuda.set_device(rank)
    topology = EpTopology(world_size, 1, 1)
    old = np.arange(world_size)[None]
    make = lambda: new_transfer_group("nccl", os.environ)  # noqa: E731
    gloo = lambda: dist.new_group(backend="gloo")  # noqa: E731
    wire = TorchCommunicator(make(), torch.device("cuda", rank), control_group=gloo(), new_group=make)
    updater = ExpertLocationUpdater(wire, topology, [[torch.full((1, 64), float(rank), device="cuda")]])
    updater.warm_up()
    runner, host = TransferWorker(updater), TorchCommunicator(gloo())
    runner.start(plan_transfer(old, np.roll(old, 1, axis=1), topology))
    while runner.active:
        if runner.poll(host) == TransferState.READY:
            runner.commit(lambda *_: None)
    free, total = torch.cuda.mem_get_info(0) if rank == 0 else (0, 0)
    host.barrier()
    runner.close()
    return total - free


@pytest.mark.gpu(count=2)
@pytest.mark.timeout(120)
def test_no_rank_makes_a_context_on_gpu_0(record_property: Any) -> None:
    """Settles A7. One context with NCCL takes about a gigabyte; each further rank's would add half of one."""
    used = run_ranks(_memory_on_gpu_0, torch.cuda.device_count(), timeout=100)[0]
    record_property("MiB in use on GPU 0", used >> 20)
    assert used < 1.5 * (1 << 30)
