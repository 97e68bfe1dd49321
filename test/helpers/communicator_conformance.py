"""What every communicator must do: checks that all ranks run together, whatever carries the messages."""

from __future__ import annotations

import time

import pytest
import torch

from equipoise.distributed.communicator import Communicator
from equipoise.errors import TransferError, TransferTimeout


def message(sender: int, receiver: int, number: int, size: int = 33) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10_000 * sender + 100 * receiver + number)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)


def knows_its_rank(communicator: Communicator) -> None:
    assert isinstance(communicator, Communicator)
    ranks = communicator.all_gather_object(communicator.rank)
    assert ranks == list(range(communicator.world_size))


def everybody_sends_to_everybody(communicator: Communicator) -> None:
    me, peers = communicator.rank, [r for r in range(communicator.world_size) if r != communicator.rank]
    landed = {peer: torch.zeros(33, dtype=torch.uint8) for peer in peers}
    communicator.exchange([(p, message(me, p, 0)) for p in peers], [(p, landed[p]) for p in peers], 20.0)
    for peer in peers:
        assert torch.equal(landed[peer], message(peer, me, 0))


def messages_of_a_pair_stay_in_order(communicator: Communicator) -> None:
    me, size = communicator.rank, communicator.world_size
    to, frm = (me + 1) % size, (me - 1) % size
    for base in (0, 10):  # within an exchange, and from one to the next
        landed = [torch.zeros(33 + i, dtype=torch.uint8) for i in range(5)]
        sends = [(to, message(me, to, base + i, 33 + i)) for i in range(5)]
        communicator.exchange(sends, [(frm, each) for each in landed], 20.0)
        for i, each in enumerate(landed):
            assert torch.equal(each, message(frm, me, base + i, 33 + i))


def carries_any_dtype(communicator: Communicator) -> None:
    me, size = communicator.rank, communicator.world_size
    to, frm = (me + 1) % size, (me - 1) % size
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.int64, torch.bool):
        bits = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1] * 8, dtype=torch.uint8)
        sent, landed = bits.view(dtype), torch.zeros_like(bits).view(dtype)
        communicator.exchange([(to, sent)], [(frm, landed)], 20.0)
        assert torch.equal(landed.view(torch.uint8), bits), dtype


def large_messages_both_ways_do_not_block(communicator: Communicator) -> None:
    me, size = communicator.rank, communicator.world_size
    to, frm = (me + 1) % size, (me - 1) % size
    sent = torch.full((2 << 20,), me, dtype=torch.uint8)
    landed = torch.zeros_like(sent)
    communicator.exchange([(to, sent)], [(frm, landed)], 30.0)
    assert bool((landed == frm).all())


def one_tensor_can_go_to_several_peers(communicator: Communicator) -> None:
    sent, landed = torch.arange(7), torch.zeros(7, dtype=torch.int64)
    if communicator.rank == 0:
        communicator.exchange([(p, sent) for p in range(1, communicator.world_size)], [], 20.0)
    else:
        communicator.exchange([], [(0, landed)], 20.0)
        assert torch.equal(landed, sent)


def an_empty_exchange_returns(communicator: Communicator) -> None:
    communicator.exchange([], [], 1.0)
    communicator.barrier()


def sums_over_ranks(communicator: Communicator) -> None:
    size = communicator.world_size
    small = torch.tensor([communicator.rank, 1], dtype=torch.int64)
    communicator.all_reduce_sum_(small)
    assert small.tolist() == [size * (size - 1) // 2, size]
    large = torch.full((50, 100), float(communicator.rank))
    communicator.all_reduce_sum_(large)
    assert bool((large == size * (size - 1) / 2).all())


def a_posted_sum_arrives_beside_other_traffic(communicator: Communicator) -> None:
    size, rank = communicator.world_size, communicator.rank
    first, second = torch.tensor([rank, 1]), torch.tensor([10 * rank])
    pending = communicator.post_sum(first)
    assert communicator.broadcast_object(rank, 1) == 1
    also = communicator.post_sum(second)
    communicator.barrier()
    pending.wait(20.0)
    also.wait(20.0)
    assert first.tolist() == [size * (size - 1) // 2, size]
    assert second.tolist() == [10 * (size * (size - 1) // 2)]
    for dtype in (torch.int32, torch.float32, torch.int16):
        matrix = torch.full((3, 1), rank, dtype=dtype)
        communicator.post_sum(matrix).wait(20.0)
        assert matrix.tolist() == [[size * (size - 1) // 2]] * 3


def posting_a_sum_waits_for_nobody(communicator: Communicator) -> None:
    start = time.monotonic()
    if communicator.rank == 0:
        time.sleep(0.5)
    value = torch.ones(1, dtype=torch.int64)
    pending = communicator.post_sum(value)
    assert communicator.rank == 0 or time.monotonic() - start < 0.4
    pending.wait(20.0)
    assert time.monotonic() - start > 0.4
    assert int(value) == communicator.world_size


def objects_travel(communicator: Communicator) -> None:
    values = communicator.all_gather_object({"rank": communicator.rank, "pad": "x" * 1000 * communicator.rank})
    assert [v["rank"] for v in values] == list(range(communicator.world_size))
    assert len(values[-1]["pad"]) == 1000 * (communicator.world_size - 1)
    for src in range(communicator.world_size):
        told = communicator.broadcast_object(["from", communicator.rank], src)
        assert told == ["from", src]


def what_was_gathered_is_ones_own(communicator: Communicator) -> None:
    values = communicator.all_gather_object([communicator.rank])
    values[0].append("changed here only")
    communicator.barrier()
    assert communicator.all_gather_object([communicator.rank])[0] == [0]
    told = communicator.broadcast_object([1], 0)
    told.append(communicator.rank)
    assert len(told) == 2


def a_barrier_waits_for_the_last(communicator: Communicator) -> None:
    start = time.monotonic()
    if communicator.rank == communicator.world_size - 1:
        time.sleep(0.3)
    communicator.barrier()
    assert time.monotonic() - start > 0.25


def a_missing_message_is_a_transfer_error_and_rebuild_helps(communicator: Communicator) -> None:
    me, size = communicator.rank, communicator.world_size
    frm = (me - 1) % size
    landed = torch.zeros(8, dtype=torch.uint8)
    start = time.monotonic()
    with pytest.raises(TransferError) as caught:  # nobody sends: a timeout, or the hang-up of a peer that timed out
        communicator.exchange([], [(frm, landed)], 1.0)
    assert time.monotonic() - start < 15
    kinds = communicator.all_gather_object(type(caught.value).__name__)
    assert TransferTimeout.__name__ in kinds
    communicator.rebuild()
    exchange_around(communicator)
    communicator.rebuild(control=True)
    exchange_around(communicator)
    assert communicator.all_gather_object(me) == list(range(size))


def exchange_around(communicator: Communicator) -> None:
    me, size = communicator.rank, communicator.world_size
    to, frm = (me + 1) % size, (me - 1) % size
    landed = torch.zeros(8, dtype=torch.uint8)
    communicator.exchange([(to, torch.full((8,), me, dtype=torch.uint8))], [(frm, landed)], 20.0)
    assert landed.tolist() == [frm] * 8


CHECKS = (
    knows_its_rank,
    everybody_sends_to_everybody,
    messages_of_a_pair_stay_in_order,
    carries_any_dtype,
    large_messages_both_ways_do_not_block,
    one_tensor_can_go_to_several_peers,
    an_empty_exchange_returns,
    sums_over_ranks,
    a_posted_sum_arrives_beside_other_traffic,
    posting_a_sum_waits_for_nobody,
    objects_travel,
    what_was_gathered_is_ones_own,
    a_barrier_waits_for_the_last,
    a_missing_message_is_a_transfer_error_and_rebuild_helps,
)
