"""For GPUs that cannot reach each other: bulk tensors travel through pinned host memory over a CPU communicator.

The way is device -> pinned host -> wire -> pinned host -> device. Host buffers are kept and reused; they grow to the
largest exchange, which a plan with rounds bounds to one expert sent and one received.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from equipoise.communicator import Communicator, PeerTensor


class PinnedHostCommunicator:
    """A :class:`~equipoise.communicator.Communicator` for tensors on ``device`` over one for tensors on the CPU.

    Args:
        inner: reaches the other ranks with CPU tensors, such as a TorchCommunicator over gloo.
        device: where the bulk tensors live. A CPU works too, with memory that is not pinned.
    """

    def __init__(self, inner: Communicator, device: torch.device | str) -> None:
        self._inner = inner
        self.device = torch.device(device)
        self._outgoing = self._host_buffer(0)
        self._incoming = self._host_buffer(0)

    @property
    def rank(self) -> int:
        return self._inner.rank

    @property
    def world_size(self) -> int:
        return self._inner.world_size

    @property
    def host_bytes(self) -> int:
        """Pinned memory held."""
        return self._outgoing.numel() + self._incoming.numel()

    def exchange(self, sends: Sequence[PeerTensor], recvs: Sequence[PeerTensor], timeout: float) -> None:
        self._outgoing, outgoing = self._slices(self._outgoing, sends)
        self._incoming, incoming = self._slices(self._incoming, recvs)
        for (_, tensor), host in zip(sends, outgoing, strict=True):
            host.copy_(tensor.reshape(-1).view(torch.uint8), non_blocking=True)
        self._finish()
        self._inner.exchange(
            [(peer, host) for (peer, _), host in zip(sends, outgoing, strict=True)],
            [(peer, host) for (peer, _), host in zip(recvs, incoming, strict=True)],
            timeout,
        )
        for (_, tensor), host in zip(recvs, incoming, strict=True):
            tensor.view(-1).view(torch.uint8).copy_(host, non_blocking=True)
        self._finish()

    def all_reduce_sum_(self, tensor: torch.Tensor, timeout: float = 60.0) -> None:
        if tensor.device.type == "cpu":
            self._inner.all_reduce_sum_(tensor, timeout)
            return
        on_host = tensor.cpu()
        self._inner.all_reduce_sum_(on_host, timeout)
        tensor.copy_(on_host)

    def all_gather_object(self, value: Any, timeout: float = 60.0) -> list[Any]:
        return self._inner.all_gather_object(value, timeout)

    def broadcast_object(self, value: Any, src: int, timeout: float = 60.0) -> Any:
        return self._inner.broadcast_object(value, src, timeout)

    def barrier(self, timeout: float = 60.0) -> None:
        self._inner.barrier(timeout)

    def rebuild(self) -> None:
        self._inner.rebuild()

    def _slices(self, buffer: torch.Tensor, messages: Sequence[PeerTensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """A part of ``buffer``, or of a larger one that takes its place, for each message."""
        sizes = [tensor.numel() * tensor.element_size() for _, tensor in messages]
        if sum(sizes) > buffer.numel():
            buffer = self._host_buffer(sum(sizes))
        return buffer, list(buffer[: sum(sizes)].split(sizes)) if sizes else []

    def _host_buffer(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def _finish(self) -> None:
        """The transport below knows no streams: copies must have ended before it starts, and before we return."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
