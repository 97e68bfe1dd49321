"""The conformance suite on ranks that are threads."""

from __future__ import annotations

import pytest
import torch

from equipoise.distributed.in_memory import InMemoryHub
from equipoise.distributed.pinned_host import PinnedHostCommunicator
from equipoise.errors import TransferError
from helpers.communicator_conformance import CHECKS
from helpers.run_threads import results_of


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_in_memory(check):
    results_of(check, 3)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_pinned_host_over_in_memory(check):
    results_of(lambda inner: check(PinnedHostCommunicator(inner, "cpu")), 3)


def test_pinned_host_memory_is_reused_and_bounded_by_the_largest_exchange():
    def body(inner):
        communicator = PinnedHostCommunicator(inner, "cpu")
        peer = 1 - communicator.rank
        for size in (100, 4000, 300):
            landed = torch.zeros(size, dtype=torch.uint8)
            communicator.exchange([(peer, torch.ones(size, dtype=torch.uint8))], [(peer, landed)], 5.0)
            assert bool(landed.all())
        return communicator.host_bytes

    assert results_of(body, 2) == [8000, 8000]


def test_in_memory_messages_of_the_wrong_size_are_refused():
    communicators = InMemoryHub(2).communicators()
    communicators[0].exchange([(1, torch.zeros(3))], [], 1.0)
    with pytest.raises(TransferError, match="expected 8 bytes from rank 0, got 12"):
        communicators[1].exchange([], [(0, torch.zeros(2))], 1.0)


def test_pinned_host_memory_is_reserved_before_it_is_needed_and_made_whole_by_a_rebuild():
    def body(inner):
        communicator = PinnedHostCommunicator(inner, "cpu")
        communicator.reserve(1000, 2)
        reserved, peer = communicator.host_bytes, 1 - communicator.rank
        for size in (1000, 10, 700):
            landed = torch.zeros(size, dtype=torch.uint8)
            communicator.exchange([(peer, torch.ones(size, dtype=torch.uint8))], [(peer, landed)], 5.0)
        assert communicator.host_bytes == reserved, "what was reserved fits, whatever lies on top"
        with pytest.raises(TransferError):
            communicator.exchange([], [(peer, torch.zeros(9))], 0.05)
        communicator.barrier()
        communicator.rebuild()
        return reserved, communicator.host_bytes, len(communicator._free)

    assert results_of(body, 2) == [(4000, 4000, 4)] * 2
