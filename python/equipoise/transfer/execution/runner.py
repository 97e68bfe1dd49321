"""Defines how a host drives a transfer, and runs one inline, in the serving thread.

Both runners have one interface, so a manager drives all modes alike::

    runner.start(plan)
    while runner.active:
        ... forward pass ...
        while runner.poll(communicator, failed=failed) == TransferState.READY:  # collective: the same answer everywhere
            committed = runner.commit(update_maps)  # local; raises the TransferError of all ranks

``poll`` is where ranks agree: a batch is ready when every rank's staging and vote are behind it, so all of them commit
it between the same two forward passes. That also settles what a vote that broke off leaves in doubt: if one rank does
not know whether all others could commit, nobody commits. Once no rank is inside the transfer any more, all of them make
new groups in the same poll, and the plan ends as one that was voted down does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Protocol

import torch

from equipoise.distributed.communicator import Communicator
from equipoise.errors import InDoubtError, TransferCancelled, TransferError
from equipoise.transfer.execution.updater import CommittedBatch, ExpertLocationUpdater, StagedBatch
from equipoise.transfer.planning.types import TransferBatch, TransferPlan

logger = logging.getLogger("equipoise.transfer")


class TransferState(IntEnum):
    """How the batch under way stands, on one rank or by agreement of all. The values travel between ranks.

    A poll answers all but IN_DOUBT, which ranks tell each other and a poll settles. FAILED is told beside the state.
    """

    IDLE = 0  # no plan is under way
    WORKING = 1  # staging, or waiting for peers or their votes
    READY = 2  # commit() has a batch that all voted for, or raises the error that all of them raise
    IN_DOUBT = 3  # the vote broke off, or the thread ended: whether others could commit is not known
    BROKEN = 4  # nothing can be moved any more: a thread hangs, or there is no way to new groups
    FAILED = 5  # the host says that its own code has: nothing more commits


OnCommit = Callable[[int, TransferBatch], None]


class TransferRunner(Protocol):
    """What a manager drives; see the module."""

    @property
    def active(self) -> bool:
        """A plan is under way. The same on every rank, between polls."""
        ...

    @property
    def error(self) -> str | None:
        """Why poll says BROKEN (of this rank; None if it was another one's worker)."""
        ...

    def start(self, plan: TransferPlan) -> None:
        """Begins a plan, the same on every rank. Returns at once."""
        ...

    def poll(self, communicator: Communicator, *, failed: bool = False) -> TransferState:
        """Collective, from the serving thread: asks whether all ranks can commit the next batch, or have failed it.

        BROKEN: nothing can be moved any more, for :attr:`error`. FAILED: a rank has called with ``failed`` before.

        Args:
            failed: the host's own code has, since the last poll or earlier: no rank is to commit anything more.

        Raises:
            TransferError: the ranks cannot talk over ``communicator``.
        """
        ...

    def commit(self, on_commit: OnCommit) -> CommittedBatch:
        """After READY: commits the batch and calls ``on_commit(layer_id, batch)``, which changes the maps.

        Raises:
            TransferError: the ranks voted against the batch, or could not vote; the plan has ended, its earlier batches
                stand.
        """
        ...

    def proceed(self) -> None:
        """Lets the background stage the batch after a commit; :meth:`poll` does so too.

        Called once the host has sent its messages of a tick: a thread that wakes earlier takes the interpreter from
        them, up to 5 ms each time.
        """
        ...

    def cancel(self, reason: str) -> None:
        """Collective. Has the plan under way end without another commit: the next :meth:`commit` raises
        TransferCancelled. Nothing happens where none is under way."""
        ...

    def close(self) -> None:
        """Ends the runner for good."""
        ...


class InlineRunner:
    """Stages in the serving thread, when polled: the stop-the-world and chunked modes.

    Args:
        updater: may share its communicator with the forward pass, since nothing runs at the same time.
    """

    def __init__(self, updater: ExpertLocationUpdater) -> None:
        self._updater = updater
        self._batches: Iterator[tuple[int, TransferBatch]] = iter(())
        self._plan: TransferPlan | None = None
        self._outcome: StagedBatch | TransferError | None = None
        self._next: tuple[int, TransferBatch] | None = None
        self._cancelled: str | None = None
        self.error: str | None = None

    @property
    def active(self) -> bool:
        return self._next is not None or self._outcome is not None

    def start(self, plan: TransferPlan) -> None:
        assert not self.active
        self._plan, self._cancelled = plan, None
        self._batches = batches_of(plan)
        self._next = next(self._batches, None)

    def poll(self, communicator: Communicator, *, failed: bool = False) -> TransferState:
        if self.error is not None:
            return TransferState.BROKEN
        if self._outcome is None:
            if self._next is None:
                return TransferState.IDLE
            if self._cancelled is not None:
                self._outcome, self._next = TransferCancelled(self._cancelled), None
                return TransferState.READY
            self._outcome = self._stage(*self._next, communicator, failed)
            if self._outcome is None:
                return TransferState.FAILED
            self._next = None if isinstance(self._outcome, TransferError) else next(self._batches, None)
        return TransferState.READY

    def _stage(
        self, layer_id: int, batch: TransferBatch, communicator: Communicator, failed: bool
    ) -> StagedBatch | TransferError | None:
        """None: the host of a rank has failed."""
        outcome: StagedBatch | TransferError | None = None
        doubt: str | None = None
        try:
            if self._plan is not None:
                plan, self._plan = self._plan, None
                self._updater.agree_on(plan)
            outcome = self._updater.stage(layer_id, batch)
        except TransferError as error:
            outcome = error
        except InDoubtError as error:
            doubt = str(error)
        # Hazard: a rank that knows the vote's outcome must not commit before it knows that nobody is in doubt.
        told = torch.tensor([doubt is not None, failed], dtype=torch.int64)
        communicator.all_reduce_sum_(told)
        in_doubt, have_failed = told.tolist()
        if not in_doubt:
            return outcome if not have_failed else None
        return start_over(self._updater, doubt, communicator)

    def commit(self, on_commit: OnCommit) -> CommittedBatch:
        outcome, self._outcome = self._outcome, None
        assert outcome is not None
        if isinstance(outcome, TransferError):
            self.error = self._updater.error
            raise outcome
        committed = self._updater.commit(outcome)
        on_commit(outcome.layer_id, outcome.batch)
        return committed

    def proceed(self) -> None:
        """Nothing runs in the background."""

    def cancel(self, reason: str) -> None:
        self._cancelled = reason

    def close(self) -> None:
        self._next = self._outcome = None


def batches_of(plan: TransferPlan) -> Iterator[tuple[int, TransferBatch]]:
    """Yields (layer id, batch) in the order in which batches are to be committed."""
    for layer in plan.layers:
        for batch in layer.batches:
            yield layer.layer_id, batch


def start_over(updater: ExpertLocationUpdater, reason: str | None, communicator: Communicator) -> TransferError:
    """Collective, with no rank inside a transfer: gives the updaters new groups.

    Args:
        reason: why this rank needs them; None if others do.
        communicator: of the serving thread.

    Returns:
        What all ranks are to raise, with every rank's reason. Whether it worked, ``updater.error`` tells.
    """
    reasons = communicator.all_gather_object(reason)
    every_reason = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(reasons) if text)
    logger.warning("rank %d makes new transfer groups: %s", communicator.rank, every_reason)
    try:
        updater.recover()
    except TransferError as error:
        return TransferError(f"{error} (after: {every_reason})")
    return TransferError(f"the transfer broke off, nobody committed: {every_reason}")
