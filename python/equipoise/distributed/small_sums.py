"""Sums a few bytes over all ranks, over gloo but not by its ring.

In a ring every sum wakes every process 2 (G - 1) times, and a rank that has died is noticed by its neighbours only. So
a sum that is waited for goes by way of rank 0, and one that is posted from every rank to every other.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from equipoise.errors import TransferError, transport_error

_BY_RANK_0_TAG, _POSTED_TAG = 1, 2
_LOST_BYTES = 8


def sum_by_way_of_rank_0_(group: dist.ProcessGroup, tensor: torch.Tensor, timeout: float) -> None:
    """Replaces a CPU ``tensor`` by its sum; rank 0's answer starts with eight bytes: 0, or 1 + the rank it has lost.

    Raises:
        TransferError: on all ranks that reach rank 0, as soon as that knows.
    """
    rank, size, limit = group.rank(), group.size(), timedelta(seconds=timeout)
    answer = torch.zeros(_LOST_BYTES + tensor.nbytes, dtype=torch.uint8)
    lost = answer[:_LOST_BYTES].view(torch.int64)
    result = answer[_LOST_BYTES:].view(tensor.dtype).view(tensor.shape)
    peers = range(1, size)
    waits_for = 0
    try:
        if rank != 0:
            group.send([tensor], 0, _BY_RANK_0_TAG).wait(limit)
            group.recv([answer], 0, _BY_RANK_0_TAG).wait(limit)
            if int(lost):
                raise TransferError(f"rank {int(lost) - 1} has failed or left")
            tensor.copy_(result)
            return
        parts = torch.empty(size - 1, *tensor.shape, dtype=tensor.dtype)
        works = []
        for waits_for in peers:
            works.append(group.recv([parts[waits_for - 1]], waits_for, _BY_RANK_0_TAG))
        for waits_for in peers:
            works[waits_for - 1].wait(limit)
        tensor += parts.sum(0, dtype=tensor.dtype)
        result.copy_(tensor)
        for work in [group.send([answer], peer, _BY_RANK_0_TAG) for peer in peers]:
            work.wait(limit)
    except RuntimeError as error:
        if rank == 0:
            lost.fill_(1 + waits_for)
            for other in peers:
                with suppress(RuntimeError):
                    group.send([answer], other, _BY_RANK_0_TAG).wait(timedelta(seconds=1))
        raise transport_error(error, f"all_reduce on rank {rank} with rank {waits_for}", timeout) from error


class PostedSum:
    """Holds a sum under way: every rank sends its part to every other, and adds up what it has got when it waits.

    A part starts with eight bytes: 0, or 1 + the rank that its sender has lost. A rank that fails here sends that as
    its next part, so that nobody waits for it, however far the others have got.

    Args:
        group: a gloo group.
        tensor: on the CPU; not to be touched until :meth:`wait` has put the sum there.
    """

    def __init__(self, group: dist.ProcessGroup, tensor: torch.Tensor) -> None:
        self._group = group
        self._tensor = tensor
        self._peers = [peer for peer in range(group.size()) if peer != group.rank()]
        self._end = _LOST_BYTES + tensor.nbytes
        # Every rank's part starts where its first eight bytes can be read as one integer.
        part_bytes = -(-self._end // _LOST_BYTES) * _LOST_BYTES
        self._parts = torch.zeros(group.size(), part_bytes, dtype=torch.uint8)
        mine = self._parts[group.rank()]
        mine[_LOST_BYTES : self._end].view(tensor.dtype).copy_(tensor.view(-1))
        self._receives = [group.recv([self._parts[peer]], peer, _POSTED_TAG) for peer in self._peers]
        self._sends = [group.send([mine], peer, _POSTED_TAG) for peer in self._peers]

    def wait(self, timeout: float) -> None:
        """See :meth:`equipoise.distributed.communicator.Pending.wait`."""
        limit = timedelta(seconds=timeout)
        waits_for = self._group.rank()
        try:
            for waits_for, work in zip(self._peers, self._receives, strict=True):
                work.wait(limit)
                lost = int(self._parts[waits_for, :_LOST_BYTES].view(torch.int64))
                if lost:
                    self._announce_loss(lost - 1)
                    raise TransferError(f"rank {lost - 1} has failed or left")
            for work in self._sends:
                work.wait(limit)
        except RuntimeError as error:
            self._announce_loss(waits_for)
            raise transport_error(error, f"sum on rank {self._group.rank()} with rank {waits_for}", timeout) from error
        values = self._parts[:, _LOST_BYTES : self._end].contiguous().view(self._tensor.dtype)
        self._tensor.copy_(values.sum(0, dtype=values.dtype).view(self._tensor.shape))

    def _announce_loss(self, lost: int) -> None:
        """Sends the number of the lost rank to all others, as this rank's next part."""
        part = torch.zeros_like(self._parts[0])
        part[:_LOST_BYTES].view(torch.int64).fill_(1 + lost)
        for peer in self._peers:
            with suppress(RuntimeError):
                self._group.send([part], peer, _POSTED_TAG).wait(timedelta(seconds=1))
