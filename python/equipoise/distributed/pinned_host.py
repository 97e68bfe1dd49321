"""Carries bulk tensors of a device through pinned host memory, over a communicator of the CPU.

The way is device -> pinned host -> wire -> pinned host -> device. It needs no kernel on the device, so it cannot get in
the way of a forward pass's collectives: the safe transport where NCCL overlapped with serving is not. Host buffers are
kept and reused; there are two for each exchange in flight, as large as the largest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from equipoise.distributed.protocol import Communicator, PeerTensor, Pending


class PinnedHostCommunicator:
    """A ``Communicator`` for tensors on ``device`` over one for tensors on the CPU.

    Args:
        inner: reaches the other ranks with CPU tensors, such as a TorchCommunicator over gloo.
        device: where the bulk tensors live. A CPU works too, with memory that is not pinned.
    """

    def __init__(self, inner: Communicator, device: torch.device | str) -> None:
        self._inner = inner
        self.device = torch.device(device)
        self._free: list[torch.Tensor] = []
        self._reserved = 0, 0  # bytes of a buffer, exchanges in flight
        self.host_bytes = 0
        """Pinned memory held, in bytes."""

    @property
    def rank(self) -> int:
        return self._inner.rank

    @property
    def world_size(self) -> int:
        return self._inner.world_size

    @property
    def knows_streams(self) -> bool:
        return False

    def reserve(self, num_bytes: int, in_flight: int) -> None:
        # Hazard: pinning takes tens of milliseconds and synchronises the device, so not beside a forward pass.
        self._reserved = num_bytes, in_flight
        for _ in range(2 * in_flight - len(self._free)):
            self._free.append(self._allocate(num_bytes))

    def connect(self, timeout: float = 60.0) -> None:
        self._inner.connect(timeout)

    def exchange(self, sends: Sequence[PeerTensor], recvs: Sequence[PeerTensor], timeout: float) -> None:
        self.post(sends, recvs).wait(timeout)

    def post(self, sends: Sequence[PeerTensor], recvs: Sequence[PeerTensor]) -> Pending:
        outgoing, incoming = self._take_buffer(sends), self._take_buffer(recvs)
        for (_, tensor), host in zip(sends, outgoing.parts, strict=True):
            host.copy_(tensor.reshape(-1).view(torch.uint8), non_blocking=True)
        self.finish_copies()
        inner = self._inner.post(
            [(peer, host) for (peer, _), host in zip(sends, outgoing.parts, strict=True)],
            [(peer, host) for (peer, _), host in zip(recvs, incoming.parts, strict=True)],
        )
        return _PinnedPending(self, inner, outgoing, incoming, recvs)

    def all_reduce_sum_(self, tensor: torch.Tensor, timeout: float = 60.0) -> None:
        if tensor.device.type == "cpu":
            self._inner.all_reduce_sum_(tensor, timeout)
            return
        on_host = tensor.cpu()
        self._inner.all_reduce_sum_(on_host, timeout)
        tensor.copy_(on_host)

    def post_sum(self, tensor: torch.Tensor, timeout: float = 600.0) -> Pending:
        return self._inner.post_sum(tensor, timeout)

    def all_gather_object(self, value: Any, timeout: float = 60.0) -> list[Any]:
        return self._inner.all_gather_object(value, timeout)

    def broadcast_object(self, value: Any, src: int, timeout: float = 60.0) -> Any:
        return self._inner.broadcast_object(value, src, timeout)

    def barrier(self, timeout: float = 60.0) -> None:
        self._inner.barrier(timeout)

    def rebuild(self, *, control: bool = False) -> None:
        self._inner.rebuild(control=control)
        # Buffers of exchanges that failed were not given back: the old transport could still write to them.
        self.host_bytes = sum(self._held(memory.numel()) for memory in self._free)
        self.reserve(*self._reserved)

    def finish_copies(self) -> None:
        """The transport below knows no streams: copies must have ended before it starts, and before we return."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def give_back(self, buffer: _HostBuffer) -> None:
        """Keeps a buffer for the next exchange."""
        if buffer.memory.numel():
            self._free.append(buffer.memory)

    def _take_buffer(self, messages: Sequence[PeerTensor]) -> _HostBuffer:
        """Takes the smallest free buffer that fits, or one in place of the largest, with a part for each message."""
        sizes = [tensor.numel() * tensor.element_size() for _, tensor in messages]
        if not sizes:
            return _HostBuffer(torch.empty(0, dtype=torch.uint8), [])
        self._free.sort(key=torch.Tensor.numel)
        fitting = next((i for i, memory in enumerate(self._free) if memory.numel() >= sum(sizes)), None)
        if fitting is not None:
            memory = self._free.pop(fitting)
        else:
            if self._free:
                self.host_bytes -= self._held(self._free.pop().numel())
            memory = self._allocate(sum(sizes))
        return _HostBuffer(memory, list(memory[: sum(sizes)].split(sizes)))

    def _allocate(self, num_bytes: int) -> torch.Tensor:
        self.host_bytes += self._held(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def _held(self, num_bytes: int) -> int:
        """Bytes that a buffer takes: torch rounds pinned ones up to a power of two."""
        return 1 << (num_bytes - 1).bit_length() if self.device.type == "cuda" and num_bytes else num_bytes


@dataclass(frozen=True, eq=False)
class _HostBuffer:
    memory: torch.Tensor
    parts: list[torch.Tensor]


class _PinnedPending:
    def __init__(
        self,
        communicator: PinnedHostCommunicator,
        inner: Pending,
        outgoing: _HostBuffer,
        incoming: _HostBuffer,
        recvs: Sequence[PeerTensor],
    ) -> None:
        self._communicator = communicator
        self._inner = inner
        self._outgoing, self._incoming = outgoing, incoming
        self._recvs = recvs

    def wait(self, timeout: float) -> None:
        self._inner.wait(timeout)
        for (_, tensor), host in zip(self._recvs, self._incoming.parts, strict=True):
            tensor.view(-1).view(torch.uint8).copy_(host, non_blocking=True)
        self._communicator.finish_copies()
        # Not after a failure: the transport may still write there.
        self._communicator.give_back(self._incoming)
        self._communicator.give_back(self._outgoing)
