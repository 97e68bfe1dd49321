"""The conformance suite on real gloo ranks."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch.distributed as dist

from communicator_conformance import CHECKS
from equipoise.communicator import Communicator, TorchCommunicator
from equipoise.errors import TransferError
from equipoise.pinned_host_communicator import PinnedHostCommunicator
from run_ranks import run_ranks

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


def rebuild_without_a_way(_rank: int, _world_size: int) -> str:
    communicator = TorchCommunicator(dist.group.WORLD)
    with pytest.raises(TransferError, match="no way to make a new one") as caught:
        communicator.rebuild()
    with pytest.raises(TransferError, match="control group is broken, and its host gave no way"):
        TorchCommunicator(dist.group.WORLD, new_group=new_gloo_group).rebuild(control=True)
    return str(caught.value)


def test_a_group_that_cannot_be_rebuilt_says_so():
    assert len(run_ranks(rebuild_without_a_way, 2, timeout=60)) == 2
