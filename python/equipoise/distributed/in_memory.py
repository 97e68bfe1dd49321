"""Connects ranks that are threads of one process: for tests, and for a host with one process and several devices."""

from __future__ import annotations

import copy
import threading
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

import torch

from equipoise.distributed.protocol import PeerTensor, Pending
from equipoise.errors import TransferError, TransferTimeout

_Collective = tuple[int, int]  # how often the ranks have started over, number since


class InMemoryHub:
    """What the ranks share: mail boxes between pairs and the values of the collective under way."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.condition = threading.Condition()
        self.boxes: dict[tuple[int, int], deque[torch.Tensor]] = defaultdict(deque)
        self.gathering: dict[_Collective, dict[int, Any]] = defaultdict(dict)  # rank -> value
        self.taken: dict[_Collective, int] = defaultdict(int)

    def communicator(self, rank: int) -> InMemoryCommunicator:
        return InMemoryCommunicator(self, rank)

    def communicators(self) -> list[InMemoryCommunicator]:
        return [self.communicator(rank) for rank in range(self.world_size)]


class _InMemoryPending:
    def __init__(self, communicator: InMemoryCommunicator, recvs: Sequence[PeerTensor]) -> None:
        self._communicator = communicator
        self._recvs = recvs

    def wait(self, timeout: float) -> None:
        self._communicator.receive(self._recvs, timeout)


class _InMemorySum:
    def __init__(
        self, communicator: InMemoryCommunicator, tensor: torch.Tensor, number: _Collective, timeout: float
    ) -> None:
        self._communicator = communicator
        self._tensor = tensor
        self._number = number
        self._timeout = timeout

    def wait(self, timeout: float) -> None:
        values = self._communicator.values_of(self._number, min(timeout, self._timeout))
        self._tensor.copy_(torch.stack(values).sum(0))


class InMemoryCommunicator:
    """One rank of an :class:`InMemoryHub`; see :class:`~equipoise.distributed.communicator.Communicator`."""

    def __init__(self, hub: InMemoryHub, rank: int) -> None:
        self._hub = hub
        self._rank = rank
        self._num_collectives = 0
        self._num_rebuilt = 0

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._hub.world_size

    @property
    def knows_streams(self) -> bool:
        return False

    def reserve(self, num_bytes: int, in_flight: int) -> None:
        """Messages are copied where they are: nothing is needed."""

    def connect(self, timeout: float = 60.0) -> None:
        self.barrier(timeout)

    def exchange(self, sends: Sequence[PeerTensor], recvs: Sequence[PeerTensor], timeout: float) -> None:
        self.post(sends, recvs).wait(timeout)

    def post(self, sends: Sequence[PeerTensor], recvs: Sequence[PeerTensor]) -> Pending:
        hub = self._hub
        messages = [(peer, _bytes_of(tensor).clone()) for peer, tensor in sends]
        _finish_stream([tensor for _, tensor in messages])  # the receiver copies on a stream of its own
        with hub.condition:
            for peer, message in messages:
                hub.boxes[self._rank, peer].append(message)
            hub.condition.notify_all()
        return _InMemoryPending(self, recvs)

    def receive(self, recvs: Sequence[PeerTensor], timeout: float) -> None:
        """Takes the next messages out of their boxes."""
        hub, deadline = self._hub, time.monotonic() + timeout
        for peer, tensor in recvs:
            box = hub.boxes[peer, self._rank]
            with hub.condition:
                if not hub.condition.wait_for(lambda box=box: len(box) > 0, deadline - time.monotonic()):  # type: ignore[misc]
                    raise TransferTimeout(f"rank {self._rank} received nothing from rank {peer} within {timeout:g} s")
                message = box.popleft()
            target = _bytes_of(tensor)
            if message.numel() != target.numel():
                raise TransferError(
                    f"rank {self._rank} expected {target.numel()} bytes from rank {peer}, got {message.numel()}"
                )
            target.copy_(message)
            _finish_stream([target])  # or the message's memory could be handed out again before it has been read

    def all_reduce_sum_(self, tensor: torch.Tensor, timeout: float = 60.0) -> None:
        tensor.copy_(torch.stack(self._gather(tensor.clone(), timeout)).sum(0))

    def post_sum(self, tensor: torch.Tensor, timeout: float = 600.0) -> Pending:
        return _InMemorySum(self, tensor, self.join(tensor.clone()), timeout)

    def all_gather_object(self, value: Any, timeout: float = 60.0) -> list[Any]:
        return [copy.deepcopy(each) for each in self._gather(copy.deepcopy(value), timeout)]

    def broadcast_object(self, value: Any, src: int, timeout: float = 60.0) -> Any:
        sent = self._gather(copy.deepcopy(value) if self._rank == src else None, timeout)[src]
        return value if self._rank == src else copy.deepcopy(sent)

    def barrier(self, timeout: float = 60.0) -> None:
        self._gather(None, timeout)

    def rebuild(self, *, control: bool = False) -> None:
        if control:  # a rank may have left out a collective: count anew
            self._num_rebuilt, self._num_collectives = self._num_rebuilt + 1, 0
        self.barrier()
        with self._hub.condition:
            for peer in range(self.world_size):
                self._hub.boxes[peer, self._rank].clear()
        self.barrier()

    def _gather(self, value: Any, timeout: float) -> list[Any]:
        return self.values_of(self.join(value), timeout)

    def join(self, value: Any) -> _Collective:
        """Brings this rank's value to the next collective; returns which one that is."""
        hub, number = self._hub, (self._num_rebuilt, self._num_collectives)
        self._num_collectives += 1
        with hub.condition:
            hub.gathering[number][self._rank] = value
            hub.condition.notify_all()
        return number

    def values_of(self, number: _Collective, timeout: float) -> list[Any]:
        """All ranks' values of a collective, once all have joined."""
        hub = self._hub
        with hub.condition:
            values = hub.gathering[number]
            if not hub.condition.wait_for(lambda: len(values) == hub.world_size, timeout):
                missing = sorted(set(range(hub.world_size)) - values.keys())
                raise TransferTimeout(f"ranks {missing} did not join a collective within {timeout:g} s")
            hub.taken[number] += 1
            if hub.taken[number] == hub.world_size:
                del hub.gathering[number], hub.taken[number]
            return [values[rank] for rank in range(hub.world_size)]


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _finish_stream(tensors: Sequence[torch.Tensor]) -> None:
    """Waits for what the current stream of each CUDA device among them was told to do."""
    for device in {tensor.device for tensor in tensors if tensor.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()
