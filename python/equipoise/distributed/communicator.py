"""Implements a communicator over ``torch.distributed`` process groups: gloo, or NCCL with gloo for control."""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from equipoise.distributed.protocol import Communicator, PeerTensor, Pending
from equipoise.distributed.small_sums import PostedSum, sum_by_way_of_rank_0_
from equipoise.errors import ConfigError, TransferError, transport_error

__all__ = ["Communicator", "PeerTensor", "Pending", "TorchCommunicator"]

logger = logging.getLogger("equipoise.distributed")

# Sums of at most this many bytes over at most this many ranks are not left to the group's ring; see small_sums.py.
SMALL_SUM_BYTES = 4096
SMALL_SUM_RANKS = 64

BULK_TAG = 0


def abort_group(group: dist.ProcessGroup) -> None:
    """Ends whatever an NCCL group has under way, kernels included. Gloo has nothing to abort: its sockets are closed.

    Hazard: a receive that nobody will answer spins on the GPU, and may write to staging that the next batch reuses.
    """
    if group is not dist.group.WORLD and dist.get_backend(group) == "nccl":
        dist.distributed_c10d._abort_process_group(group)


class _TorchPending:
    """Works under way.

    Args:
        on_cuda: NCCL measures a timeout from the post, not from the wait: what has passed by then is added to it.
    """

    def __init__(self, works: list[dist.Work], what: str, *, on_cuda: bool = False) -> None:
        self._works = works
        self._what = what
        self._posted = time.monotonic() if on_cuda else None

    def wait(self, timeout: float) -> None:
        passed = 0.0 if self._posted is None else time.monotonic() - self._posted
        try:
            for work in self._works:
                work.wait(timedelta(seconds=timeout + passed))
        except RuntimeError as error:
            raise transport_error(error, self._what, timeout) from error


class TorchCommunicator:
    """Talks over ``torch.distributed`` process groups that the host hands in: gloo or NCCL.

    Args:
        group: carries the bulk. With a gloo group, tensors live on the CPU; with NCCL, on ``device``. A group for
            transfers over NCCL comes from :func:`~equipoise.distributed.groups.new_transfer_group`.
        device: where the bulk tensors live.
        control_group: a gloo group of the same ranks for the collectives on CPU tensors and objects; ``group``
            itself if None, which NCCL cannot serve. Apart from ``group``, it survives a failed transfer.
        new_group: makes a fresh bulk group of the same ranks, called by all of them; None: cannot be rebuilt.
        new_control_group: the same for the control group.

    Raises:
        ConfigError: a device other than the CPU without a control group that carries CPU tensors.
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
        self.device = torch.device(device)
        if self.device.type != "cpu" and (control_group is None or dist.get_backend(control_group) == "nccl"):
            raise ConfigError(
                f"control_group is needed for bulk on {self.device}: NCCL carries no CPU tensors, so hand in a gloo "
                "group of the same ranks",
                field="control_group",
            )
        self._group = group
        self._control = control_group if control_group is not None else group
        self._new_group = new_group
        self._new_control_group = new_control_group
        self._stream: torch.cuda.Stream | None = None  # on which messages were last posted

    @property
    def rank(self) -> int:
        return self._group.rank()

    @property
    def world_size(self) -> int:
        return self._group.size()

    @property
    def knows_streams(self) -> bool:
        return self.device.type == "cuda"

    def reserve(self, num_bytes: int, in_flight: int) -> None:
        """Messages go from and to the tensors themselves: nothing is needed."""

    def connect(self, timeout: float = 60.0) -> None:
        # NCCL connects two ranks at their first message. Where only some ranks of a group send the first one, the rest
        # would be missing from a rendezvous that no timeout covers, so everyone takes part here, in a ring.
        sent, landed = (torch.zeros(1, dtype=torch.uint8, device=self.device) for _ in range(2))
        for distance in range(1, self.world_size):
            dst, src = (self.rank + distance) % self.world_size, (self.rank - distance) % self.world_size
            self.exchange([(dst, sent)], [(src, landed)], timeout)
        self.barrier(timeout)  # nobody uses the connections before everybody has them

    def exchange(self, sends: Sequence[PeerTensor], recvs: Sequence[PeerTensor], timeout: float) -> None:
        self.post(sends, recvs).wait(timeout)

    def post(self, sends: Sequence[PeerTensor], recvs: Sequence[PeerTensor]) -> Pending:
        peers = sorted({peer for peer, _ in [*sends, *recvs]})
        what = f"transfer between rank {self.rank} and ranks {peers}"
        try:
            return _TorchPending(self._start(sends, recvs) if peers else [], what, on_cuda=self.knows_streams)
        except RuntimeError as error:
            raise transport_error(error, what, 0.0) from error

    def _start(self, sends: Sequence[PeerTensor], recvs: Sequence[PeerTensor]) -> list[dist.Work]:
        if self.device.type == "cpu":  # gloo: straight to the group, at a third of the cost of a P2POp each
            works = [self._group.recv([tensor], peer, BULK_TAG) for peer, tensor in recvs]
            return works + [self._group.send([tensor], peer, BULK_TAG) for peer, tensor in sends]
        self._stream = torch.cuda.current_stream(self.device)
        ops = [dist.P2POp(dist.irecv, tensor, group=self._group, group_peer=peer) for peer, tensor in recvs]
        ops += [dist.P2POp(dist.isend, tensor, group=self._group, group_peer=peer) for peer, tensor in sends]
        return dist.batch_isend_irecv(ops)

    def all_reduce_sum_(self, tensor: torch.Tensor, timeout: float = 60.0) -> None:
        if self.world_size == 1:
            return
        on_cpu = tensor.device.type == "cpu"
        if on_cpu and tensor.nbytes <= SMALL_SUM_BYTES and self.world_size <= SMALL_SUM_RANKS:
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
        logger.warning("rank %d makes new %s", self.rank, "bulk and control groups" if control else "bulk groups")
        try:
            if control and self._new_control_group is not None:
                self._control = self._new_control_group()
            # On all ranks, not only on those that noticed the failure, and before anything new is made: the messages of
            # the old group would otherwise wait on the device for good, beside those of the new one.
            abort_group(self._group)
            if self._stream is not None:
                self._stream.synchronize()
            self.barrier()
            self._group = self._new_group()
        except RuntimeError as error:
            raise transport_error(error, f"new process groups on rank {self.rank}", 0.0) from error
        self.connect()

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
