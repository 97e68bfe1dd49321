"""FailureWatch: an error of one rank's own code becomes one that all ranks know of, before they commit anything more.

A rank that raised in the middle of a tick must not leave the others waiting in a collective. So code that can raise by
itself runs in :meth:`FailureWatch.guard`, which notes the error and lets the rank go on with the schedule of messages;
what has been noted travels as a flag beside the next forward pass, and all ranks read it in the next tick.
Between commits it travels with the messages of the transfer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from equipoise.distributed.communicator import Communicator
from equipoise.distributed.posted_sum import SumBetweenPolls
from equipoise.errors import TransferError

RankLogger = logging.LoggerAdapter[logging.Logger]


def rank_logger(rank: int) -> RankLogger:
    """The room's logger ``equipoise.manager``, with an attribute ``rank`` in each record."""
    return logging.LoggerAdapter(logging.getLogger("equipoise.manager"), {"rank": rank})


class FailureWatch:
    """One for each rank, called alike.

    Args:
        communicator: of the serving thread.

    Attributes:
        rank: this one.
        log: its logger.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._flags = SumBetweenPolls()
        self._posted = self._marked = False
        self._own: str | None = None
        self._noted: set[str] = set()
        self.rank = communicator.rank
        self.log = rank_logger(communicator.rank)

    @property
    def under_way(self) -> bool:
        """A flag was posted and not read: another tick must follow. The same on all ranks."""
        return self._posted

    @property
    def failed(self) -> bool:
        """This rank has noted an error."""
        return self._own is not None

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Notes what the block raises; TransferErrors, which all ranks raise alike, pass."""
        try:
            yield
        except TransferError:
            raise
        except Exception as error:
            self.note(what, error)

    def note(self, what: str, error: Exception) -> None:
        """Keeps the first error of this rank, and logs the first of each ``what`` with its traceback.

        Until all ranks have stopped, what fails in one pass may fail in each.
        """
        if what not in self._noted:
            self._noted.add(what)
            self.log.error("%s failed", what, exc_info=error)
        if self._own is None:
            self._own = f"{what}: {type(error).__name__}: {error}"

    def mark(self) -> None:
        """Collective: code of ours or of the host has run in this tick, and no other message tells of it."""
        self._marked = True

    def end_tick(self, *, tell: bool) -> None:
        """Collective: sends this rank's flag to the next tick if ``tell`` says so or the tick was marked."""
        if tell or self._marked:
            self._flags.post(self._communicator, [int(self.failed)])
            self._marked, self._posted = False, True

    def take(self) -> str | None:
        """Collective, at the beginning of a tick: what has failed, of all ranks; None if nothing was told to have.

        Raises:
            TransferError: the ranks cannot talk.
        """
        if not self._posted:
            return None
        self._posted = False
        flags = self._flags.take()
        return self.reasons() if flags != [0] else None

    def agree(self) -> str | None:
        """Collective and waited for, before a rank sends what it has computed: as :meth:`take`."""
        flag = torch.tensor([int(self.failed)], dtype=torch.int64)
        self._communicator.all_reduce_sum_(flag)
        return self.reasons() if flag else None

    def reasons(self) -> str:
        """Collective: what has failed, of all ranks."""
        reasons = self._communicator.all_gather_object(self._own)
        return "; ".join(f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason is not None)
