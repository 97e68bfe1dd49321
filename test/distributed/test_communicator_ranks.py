"""The conformance suite on real gloo ranks."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from equipoise.distributed.communicator import Communicator, TorchCommunicator
from equipoise.distributed.pinned_host import PinnedHostCommunicator
from equipoise.distributed.small_sums import PostedSum
from equipoise.errors import TransferError
from helpers.communicator_conformance import CHECKS
from helpers.run_ranks import run_ranks

LIMIT = timedelta(seconds=60)


def new_gloo_group() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=LIMIT)


def make(kind: str) -> Communicator:
    communicator = TorchCommunicator(
        new_gloo_group(),
        control_group=new_gloo_group(),
        new_group=new_gloo_group,
        new_control_group=new_gloo_group,
    )
    if kind == "pinned":
        return PinnedHostCommunicator(communicator, "cpu")
    return communicator


def run_all_checks(_rank: int, _world_size: int, kind: str) -> list[str]:
    under_test = make(kind)
    passed = []
    for check in CHECKS:
        check(under_test)
        passed.append(check.__name__)
    return passed


@pytest.mark.parametrize("kind", ["torch", "pinned"])
def test_conformance(kind):
    results = run_ranks(run_all_checks, 4, kind, timeout=120)
    assert results == [[check.__name__ for check in CHECKS]] * 4


class SaysNothingTo0:
    """A group that loses what is sent to rank 0."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank, self.size, self.recv = group.rank, group.size, group.recv

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Any:
        return self._group.send(tensors, peer, tag) if peer else SimpleNamespace(wait=lambda _: None)


def lose_the_last_rank(rank: int, world_size: int) -> tuple[str, float]:
    """Rank 3 dies after it has sent its part to all but rank 0: that fails now, the others one sum later."""
    group = new_gloo_group()
    communicator = TorchCommunicator(group, control_group=group)
    start = time.monotonic()
    if rank == world_size - 1:
        PostedSum(SaysNothingTo0(group), torch.ones(1)).wait(20.0)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    if rank > 0:
        communicator.post_sum(torch.ones(1)).wait(20.0)
    with pytest.raises(TransferError) as caught:
        communicator.post_sum(torch.ones(1)).wait(20.0)
    return str(caught.value), time.monotonic() - start


def test_a_rank_that_loses_another_tells_the_rest():
    results = run_ranks(lose_the_last_rank, 4, timeout=60, may_die=(3,))
    for told, seconds in results[:3]:
        assert told
        assert seconds < 10, "nobody waits for a rank that has given up"


def rebuild_without_a_way(_rank: int, _world_size: int) -> str:
    communicator = TorchCommunicator(dist.group.WORLD)
    with pytest.raises(TransferError, match="no way to make a new one") as caught:
        communicator.rebuild()
    with pytest.raises(TransferError, match="control group is broken, and its host gave no way"):
        TorchCommunicator(dist.group.WORLD, new_group=new_gloo_group).rebuild(control=True)
    return str(caught.value)


def test_a_group_that_cannot_be_rebuilt_says_so():
    assert len(run_ranks(rebuild_without_a_way, 2, timeout=60)) == 2
