"""Defines how ranks talk: point-to-point transfers and small collectives.

Two kinds of traffic are kept apart. **Bulk**: :meth:`Communicator.post`, expert weights between pairs of ranks.
**Control**: small collectives by which ranks agree. A bulk transfer that fails or times out may leave its transport
unusable (gloo closes the connections); the control group survives that, so the ranks can still vote, and
:meth:`Communicator.rebuild` makes a new bulk group, or both anew if a vote has broken off too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch

PeerTensor = tuple[int, torch.Tensor]


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

    @property
    def knows_streams(self) -> bool:
        """Whether the device itself orders what is posted, so that many exchanges may be under way at no cost."""
        ...

    def reserve(self, num_bytes: int, in_flight: int) -> None:
        """Allocates what ``in_flight`` exchanges of ``num_bytes`` each way need, so that none allocates later."""
        ...

    def connect(self, timeout: float = 60.0) -> None:
        """Collective. Opens the bulk connection between every pair of ranks, which some transports do at first use."""
        ...

    def post(self, sends: Sequence[PeerTensor], recvs: Sequence[PeerTensor]) -> Pending:
        """Starts to send and receive contiguous tensors of any dtype; none may be touched until it has been waited for.

        Messages between two ranks arrive in the order in which they were sent; both sides name the same number of
        bytes. A tensor may be sent to several peers. What was posted first is waited for first. On a CUDA device what
        the current stream was told to write before is sent, and what it is told after the wait sees what was received.
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
        """Collective. Replaces the bulk transport after a failure and connects it; messages of before are lost.

        Args:
            control: the control group as well. No thread of any rank may be in one of its collectives.

        Raises:
            TransferError: this communicator cannot.
        """
        ...
