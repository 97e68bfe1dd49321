"""FailureWatch: an error of one rank's own code becomes one that all ranks know of, in the same tick.

A rank that raised in the middle of a tick must not leave the others waiting in a collective. So code that can raise by
itself runs in :meth:`FailureWatch.guard`, which notes the error and lets the rank go on with the schedule of messages;
what has been noted travels as a flag beside the next forward pass, and all ranks read it in the next tick.
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
        self._posted = False
        self._own: str | None = None
        self.rank = communicator.rank
        self.log = rank_logger(communicator.rank)

    @property
    def under_way(self) -> bool:
        """A flag was posted and not read: another tick must follow. The same on all ranks."""
        return self._posted

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
        """Keeps the first error of this rank, and logs each with its traceback."""
        self.log.error("%s failed", what, exc_info=error)
        if self._own is None:
            self._own = f"{what}: {type(error).__name__}: {error}"

    def post(self) -> None:
        """Collective, at the end of a tick in which code of ours or of the host has run."""
        if not self._posted:
            self._flags.post(self._communicator, [int(self._own is not None)])
            self._posted = True

    def take(self) -> str | None:
        """Collective, at the beginning of a tick: what has failed, of all ranks; None if nothing has.

        Raises:
            TransferError: the ranks cannot talk.
        """
        if not self._posted:
            return None
        self._posted = False
        flags = self._flags.take()
        return self._reasons() if flags != [0] else None

    def agree(self) -> str | None:
        """Collective and waited for, before a rank sends what it has computed: as :meth:`take`."""
        flag = torch.tensor([int(self._own is not None)], dtype=torch.int64)
        self._communicator.all_reduce_sum_(flag)
        return self._reasons() if flag else None

    def _reasons(self) -> str:
        reasons = self._communicator.all_gather_object(self._own)
        return "; ".join(f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason is not None)
