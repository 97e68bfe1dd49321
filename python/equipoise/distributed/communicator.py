"""How ranks talk: one protocol, implemented over torch.distributed here and in memory in in_memory_communicator.py.

Two kinds of traffic are kept apart. **Bulk**: :meth:`Communicator.exchange`, expert weights between pairs of ranks.
**Control**: small collectives by which ranks agree. A bulk transfer that fails or times out may leave its transport
unusable (gloo closes the connections); the control group survives that, so the ranks can still vote, and
:meth:`Communicator.rebuild` makes a new bulk group, or both anew if a vote has broken off too.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist

from equipoise.distributed.small_sums import PostedSum, sum_by_way_of_rank_0_
from equipoise.errors import TransferError, transport_error

PeerTensor = tuple[int, torch.Tensor]

# Sums of at most this many bytes over at most this many ranks are not left to the group's ring; see small_sums.py.
SMALL_SUM_BYTES = 4096
SMALL_SUM_RANKS = 64

BULK_TAG = 0


class Pending(Protocol):
    """Messages under way."""

    def wait(self, timeout: float) -> None:
        """Returns when all of them are through.

        Raises:
            TransferTimeout: they are not, after ``timeout`` seconds.
            TransferError: they never will be.
        """
        ...


@runtime_checkable
class Communicator(Protocol):
    """Point-to-point transfers and small collectives among ``world_size`` ranks.

    Ranks are those of the group, 0 to ``world_size - 1``. Collectives are called by every rank in the same order.
    Every call ends within its timeout (seconds), with a result or with a :class:`~equipoise.errors.TransferError`:
    a :class:`~equipoise.errors.TransferTimeout` where a peer did not answer in time.
    """

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def post(self, sends: Sequence[PeerTensor], recvs: Sequence[PeerTensor]) -> Pending:
        """Starts to send and receive contiguous tensors of any dtype; none may be touched until it has been waited for.

        Messages between two ranks arrive in the order in which they were sent; both sides name the same number of
        bytes. A tensor may be sent to several peers. What was posted first is waited for first.
        """
        ...

    def exchange(self, sends: Sequence[PeerTensor], recvs: Sequence[PeerTensor], timeout: float) -> None:
        """Posts and waits."""
        ...

    def all_reduce_sum_(self, tensor: torch.Tensor, timeout: float = 60.0) -> None:
        """Replaces ``tensor`` by its sum over all ranks."""
        ...

    def post_sum(self, tensor: torch.Tensor, timeout: float = 600.0) -> Pending:
        """Starts to replace a CPU ``tensor`` by its sum over all ranks, beside what the caller does until it waits.

        Args:
            tensor: not to be touched until it has been waited for.
            timeout: seconds that the slowest rank may take until it joins.
        """
        ...

    def all_gather_object(self, value: Any, timeout: float = 60.0) -> list[Any]:
        """Every rank's ``value`` (picklable), in rank order."""
        ...

    def broadcast_object(self, value: Any, src: int, timeout: float = 60.0) -> Any:
        """The ``value`` of rank ``src``; what the others pass is ignored."""
        ...

    def barrier(self, timeout: float = 60.0) -> None:
        """Returns once every rank has called it."""
        ...

    def rebuild(self, *, control: bool = False) -> None:
        """Collective. Replaces the bulk transport after a failure; messages of before are lost.

        Args:
            control: the control group as well. No thread of any rank may be in one of its collectives.

        Raises:
            TransferError: this communicator cannot.
        """
        ...


class _TorchPending:
    def __init__(self, works: list[dist.Work], what: str) -> None:
        self._works = works
        self._what = what

    def wait(self, timeout: float) -> None:
        try:
            for work in self._works:
                work.wait(timedelta(seconds=timeout))
        except RuntimeError as error:
            raise transport_error(error, self._what, timeout) from error


class TorchCommunicator:
    """Over ``torch.distributed`` process groups that the host hands in: gloo or NCCL.

    Args:
        group: carries the bulk. With a gloo group, tensors live on the CPU; with NCCL, on ``device``.
        device: where the bulk tensors live.
        control_group: a gloo group of the same ranks for the collectives on CPU tensors and objects; ``group``
            itself if None. Apart from ``group``, it survives a failed transfer.
        new_group: makes a fresh bulk group of the same ranks, called by all of them; None: cannot be rebuilt.
        new_control_group: the same for the control group.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device | str = "cpu",
        *,
        control_group: dist.ProcessGroup | None = None,
        new_group: Callable[[], dist.ProcessGroup] | None = None,
        new_control_group: Callable[[], dist.ProcessGroup] | None = None,
    ) -> None:
        self._group = group
        self._control = control_group if control_group is not None else group
        self._new_group = new_group
        self._new_control_group = new_control_group
        self.device = torch.device(device)

    @property
    def rank(self) -> int:
        return self._group.rank()

    @property
    def world_size(self) -> int:
        return self._group.size()

    def exchange(self, sends: Sequence[PeerTensor], recvs: Sequence[PeerTensor], timeout: float) -> None:
        self.post(sends, recvs).wait(timeout)

    def post(self, sends: Sequence[PeerTensor], recvs: Sequence[PeerTensor]) -> Pending:
        peers = sorted({peer for peer, _ in [*sends, *recvs]})
        what = f"transfer between rank {self.rank} and ranks {peers}"
        try:
            return _TorchPending(self._start(sends, recvs) if peers else [], what)
        except RuntimeError as error:
            raise transport_error(error, what, 0.0) from error

    def _start(self, sends: Sequence[PeerTensor], recvs: Sequence[PeerTensor]) -> list[dist.Work]:
        if self.device.type == "cpu":  # gloo: straight to the group, at a third of the cost of a P2POp each
            works = [self._group.recv([tensor], peer, BULK_TAG) for peer, tensor in recvs]
            return works + [self._group.send([tensor], peer, BULK_TAG) for peer, tensor in sends]
        ops = [dist.P2POp(dist.irecv, tensor, group=self._group, group_peer=peer) for peer, tensor in recvs]
        ops += [dist.P2POp(dist.isend, tensor, group=self._group, group_peer=peer) for peer, tensor in sends]
        return dist.batch_isend_irecv(ops)

    def all_reduce_sum_(self, tensor: torch.Tensor, timeout: float = 60.0) -> None:
        on_cpu = tensor.device.type == "cpu"
        if on_cpu and tensor.nbytes <= SMALL_SUM_BYTES and 1 < self.world_size <= SMALL_SUM_RANKS:
            sum_by_way_of_rank_0_(self._control, tensor, timeout)
            return
        options = dist.AllreduceOptions()
        options.timeout = timedelta(seconds=timeout)
        group = self._control if on_cpu else self._group
        self._finish(lambda: group.allreduce([tensor], options), "all_reduce", timeout)

    def post_sum(self, tensor: torch.Tensor, timeout: float = 600.0) -> Pending:
        what = f"all_reduce on rank {self.rank}"
        options = dist.AllreduceOptions()
        options.timeout = timedelta(seconds=timeout)
        try:
            if tensor.nbytes > SMALL_SUM_BYTES or self.world_size > SMALL_SUM_RANKS:
                return _TorchPending([self._control.allreduce([tensor], options)], what)
            return PostedSum(self._control, tensor)
        except RuntimeError as error:
            raise transport_error(error, what, timeout) from error

    def all_gather_object(self, value: Any, timeout: float = 60.0) -> list[Any]:
        payload = _to_bytes(value)
        sizes = torch.zeros(self.world_size, dtype=torch.int64)
        sizes[self.rank] = payload.numel()
        self.all_reduce_sum_(sizes, timeout)
        gathered = torch.zeros(self.world_size, int(sizes.max()), dtype=torch.uint8)
        gathered[self.rank, : payload.numel()] = payload
        self.all_reduce_sum_(gathered, timeout)  # every row has one rank that filled it: the sum is what it wrote
        return [_from_bytes(row[:size]) for row, size in zip(gathered, sizes.tolist(), strict=True)]

    def broadcast_object(self, value: Any, src: int, timeout: float = 60.0) -> Any:
        payload = _to_bytes(value) if self.rank == src else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([payload.numel()], dtype=torch.int64)
        self._broadcast(size, src, timeout)
        if self.rank != src:
            payload = torch.empty(int(size), dtype=torch.uint8)
        self._broadcast(payload, src, timeout)
        return value if self.rank == src else _from_bytes(payload)

    def barrier(self, timeout: float = 60.0) -> None:
        self.all_reduce_sum_(torch.zeros(1, dtype=torch.int64), timeout)

    def rebuild(self, *, control: bool = False) -> None:
        if self._new_group is None:
            raise TransferError("the transfer's process group is broken, and its host gave no way to make a new one")
        if control and self._new_control_group is None:
            raise TransferError("the transfer's control group is broken, and its host gave no way to make a new one")
        try:
            if control and self._new_control_group is not None:
                self._control = self._new_control_group()
            self._group = self._new_group()
        except RuntimeError as error:
            raise transport_error(error, f"new process groups on rank {self.rank}", 0.0) from error
        self.barrier()  # nobody uses them before everybody has them

    def _broadcast(self, tensor: torch.Tensor, src: int, timeout: float) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = src
        options.rootTensor = 0
        options.timeout = timedelta(seconds=timeout)
        self._finish(lambda: self._control.broadcast([tensor], options), "broadcast", timeout)

    def _finish(self, start: Callable[[], dist.Work], what: str, timeout: float) -> None:
        try:
            start().wait(timedelta(seconds=timeout))
        except RuntimeError as error:
            raise transport_error(error, f"{what} on rank {self.rank}", timeout) from error


def _to_bytes(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _from_bytes(payload: torch.Tensor) -> Any:
    return pickle.loads(payload.numpy().tobytes())
