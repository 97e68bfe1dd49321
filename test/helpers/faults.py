"""Injected faults: a communicator and a memory that fail as told, wrapped round real ones.

A :class:`Fault` happens on one rank, in one phase of one layer:

==========  ==============================  ==============================================================
phase       where                           kinds
==========  ==============================  ==============================================================
transfer    first message sent              drop (not sent), corrupt, delay, raise, kill
verify      first expert that is checked    drop (wiped), corrupt, delay, raise, kill
vote        the vote                        drop (not cast), delay, kill
commit      the commit                      delay, raise, kill
==========  ==============================  ==============================================================
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from equipoise.config import Verification
from equipoise.distributed.communicator import Communicator, PeerTensor, Pending
from equipoise.errors import TransferError
from equipoise.transfer.memory.pool import ExpertPool
from equipoise.transfer.memory.pooled import PooledExperts
from equipoise.transfer.memory.protocol import ExpertMemory
from equipoise.transfer.memory.stacked import StackedExperts
from equipoise.transfer.memory.staging import StagedExpert
from equipoise.transfer.planning.rank_program import Copy

FaultKind = Literal["drop", "delay", "corrupt", "raise", "kill"]
Phase = Literal["transfer", "verify", "vote", "commit"]

_POSSIBLE: dict[str, tuple[str, ...]] = {
    "transfer": ("drop", "delay", "corrupt", "raise", "kill"),
    "verify": ("drop", "delay", "corrupt", "raise", "kill"),
    "vote": ("drop", "delay", "kill"),
    "commit": ("delay", "raise", "kill"),
}


class InjectedFault(RuntimeError):
    """Raised by a fault of kind ``raise``."""


@dataclass(frozen=True)
class Fault:
    """One planned fault. ``layer`` counts the batches of a plan, which in these tests is the layer's id."""

    kind: FaultKind
    rank: int
    phase: Phase
    layer: int | None = None  # None: whichever comes first
    times: int = 1  # how often it happens
    seconds: float = 0.0  # of a delay

    def __post_init__(self) -> None:
        assert self.phase in get_args(Phase), self.phase
        assert self.kind in _POSSIBLE[self.phase], f"kind in phase {self.phase} must be one of {_POSSIBLE[self.phase]}"


class ScheduledFaults:
    """Carries out the faults of a list that are meant for this rank, each as often as it says.

    Args:
        faults: for all ranks; those of others are ignored. May be replaced at any time.
        rank: this one.
        sleep: for delays.
        kill: ends this process at once, without a word.
    """

    def __init__(
        self,
        faults: Sequence[Fault],
        rank: int,
        *,
        sleep: Callable[[float], None] = time.sleep,
        kill: Callable[[], None] = lambda: os.kill(os.getpid(), signal.SIGKILL),
    ) -> None:
        self._rank, self._sleep, self._kill = rank, sleep, kill
        self.schedule(faults)

    def schedule(self, faults: Sequence[Fault]) -> None:
        self._faults = [fault for fault in faults if fault.rank == self._rank]
        self._left = [fault.times for fault in self._faults]

    @property
    def num_left(self) -> int:
        """Faults that have not happened yet."""
        return sum(self._left)

    def at(self, phase: Phase, layer: int) -> FaultKind | None:
        """Delays, raises or kills; returns ``drop`` or ``corrupt`` for the caller, who has the bytes in hand."""
        for index, fault in enumerate(self._faults):
            if not self._left[index] or fault.phase != phase or fault.layer not in (None, layer):
                continue
            self._left[index] -= 1
            if fault.kind == "delay":
                self._sleep(fault.seconds)
            elif fault.kind == "raise":
                raise InjectedFault(f"injected in {phase} of layer {layer}")
            elif fault.kind == "kill":
                self._kill()
            else:
                return fault.kind
        return None


class FaultyCommunicator:
    """A transfer's communicator: knows its batches by the votes, the only sums on it, and a plan by its digest."""

    def __init__(self, inner: Communicator, faults: ScheduledFaults) -> None:
        self._inner, self._faults = inner, faults
        self._batch, self._sent = 0, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def post(self, sends: Sequence[PeerTensor], recvs: Sequence[PeerTensor]) -> Pending:
        if sends and not self._sent:
            self._sent = True
            kind = self._faults.at("transfer", self._batch)
            if kind is not None:
                sends = [] if kind == "drop" else [(peer, tensor.bitwise_xor(0x55)) for peer, tensor in sends]
        return self._inner.post(sends, recvs)

    def all_reduce_sum_(self, tensor: torch.Tensor, timeout: float = 60.0) -> None:
        batch, self._batch, self._sent = self._batch, self._batch + 1, False
        if self._faults.at("vote", batch) == "drop":
            raise TransferError("the vote was not cast")
        self._inner.all_reduce_sum_(tensor, timeout)

    def all_gather_object(self, value: Any, timeout: float = 60.0) -> list[Any]:
        self._batch = 0  # a plan's digest; or why one was voted down, after which it ends
        return self._inner.all_gather_object(value, timeout)


def memory_of(weights: list[list[torch.Tensor]] | ExpertPool, verification: Verification) -> ExpertMemory:
    """The memory that an updater would make of these weights by default."""
    if isinstance(weights, ExpertPool):
        return PooledExperts(weights, weights.slots_per_rank, verification, num_send_buffers=4)
    return StackedExperts(weights, len(weights[0][0]), verification, None, default_staged=4, num_send_buffers=4)


class FaultyMemory:
    """An expert memory whose checks and commits fail as told."""

    def __init__(self, inner: ExpertMemory, faults: ScheduledFaults) -> None:
        self._inner, self._faults = inner, faults
        self._seen: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def reserve(self, num_slots: int) -> None:
        self._seen = set()  # a batch begins
        self._inner.reserve(num_slots)

    def staged(self, layer_id: int, index: int) -> StagedExpert:
        staged = self._inner.staged(layer_id, index)
        if index not in self._seen:  # asked where it is to land
            self._seen.add(index)
            return staged
        kind = self._faults.at("verify", layer_id)  # it has landed, and is to be checked (these plans have no relays)
        if kind == "drop":
            for message in staged.messages:
                message.zero_()
        elif kind == "corrupt":
            staged.rows[0][:1].bitwise_xor_(0x55)
        return staged

    def commit(self, layer_id: int, copies: Sequence[Copy]) -> None:
        self._faults.at("commit", layer_id)
        self._inner.commit(layer_id, copies)
