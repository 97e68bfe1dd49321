"""Agrees whether what the ranks have staged may be committed: by a vote, which decides the same on all of them."""

from __future__ import annotations

import logging
from enum import IntEnum

import torch
from torch.profiler import record_function

from equipoise.distributed.communicator import Communicator
from equipoise.errors import InDoubtError, TransferError, TransferTimeout, VerificationError

logger = logging.getLogger("equipoise.transfer")

# A rank that failed at once votes at once, and waits for those that find out by their timeout. A vote that is given up
# too early would leave ranks in doubt whether the others committed; a rank that died is noticed without waiting.
VOTE_GRACE_SECONDS = 30.0


class Ballot(IntEnum):
    """What a rank votes; the highest one cast decides which error all of them raise. The values travel."""

    YES = 0
    FAILED = 1
    TIMED_OUT = 2
    NOT_AS_SENT = 3


_ERRORS: dict[Ballot, type[TransferError]] = {
    Ballot.FAILED: TransferError,
    Ballot.TIMED_OUT: TransferTimeout,
    Ballot.NOT_AS_SENT: VerificationError,
}


class LayerVote:
    """Casts the votes of one rank.

    Args:
        communicator: reaches the other ranks.
        patience: seconds after which a vote is given up: more than the slowest rank may take until it votes.
    """

    def __init__(self, communicator: Communicator, patience: float) -> None:
        self._communicator = communicator
        self._patience = patience
        self.error: str | None = None
        """Why no further transfer can run before :meth:`recover`; None while one can."""

    def cast(self, layer_id: int, failure: Exception | None) -> TransferError | None:
        """Collective. Returns None if no rank failed, else the same kind of error on all of them.

        Args:
            layer_id: for the error's message.
            failure: why this rank could not commit; None: it could.

        Raises:
            InDoubtError: the vote broke off; :attr:`error` is set.
        """
        with record_function("equipoise.transfer.vote"):
            votes = torch.zeros(self._communicator.world_size, dtype=torch.int64)
            votes[self._communicator.rank] = _ballot(failure)
            reasons: list[str] = []
            try:
                self._communicator.all_reduce_sum_(votes, self._patience)
                if votes.any():
                    reasons = self._communicator.all_gather_object(_describe(failure), self._patience)
            except TransferError as error:
                before = "" if failure is None else f"; this rank had failed before: {_describe(failure)}"
                self.error = f"the vote on layer {layer_id} broke off: {error}{before}"
                logger.warning("rank %d is in doubt: %s", self._communicator.rank, self.error)
                raise InDoubtError(self.error) from error
            if not reasons:
                return None
            return self._voted_down(layer_id, votes, reasons, failure)

    def _voted_down(
        self, layer_id: int, votes: torch.Tensor, reasons: list[str], failure: Exception | None
    ) -> TransferError:
        reason = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(reasons) if text)
        logger.warning("layer %d was voted down: %s", layer_id, reason)
        # A failed exchange may have left half a message in the bulk transport. Damaged bytes have not: every message
        # has arrived, so the groups stay.
        if ((votes == Ballot.FAILED) | (votes == Ballot.TIMED_OUT)).any():
            try:
                self._communicator.rebuild()
            except TransferError as error:
                self.error = f"{error} (after: {reason})"
        result = _ERRORS[Ballot(int(votes.max()))](f"layer {layer_id} was not migrated: {reason}")
        result.__cause__ = failure
        return result

    def recover(self) -> None:
        """Collective, with no rank inside a transfer: makes new groups, the control group's as well.

        Raises:
            TransferError: they cannot be made; :attr:`error` says why.
        """
        try:
            self._communicator.rebuild(control=True)
        except TransferError as error:
            self.error = f"{error} (after: {self.error})"
            raise
        self.error = None


def _ballot(failure: Exception | None) -> Ballot:
    match failure:
        case None:
            return Ballot.YES
        case VerificationError():
            return Ballot.NOT_AS_SENT
        case TransferTimeout():
            return Ballot.TIMED_OUT
        case _:
            return Ballot.FAILED


def _describe(failure: Exception | None) -> str:
    if failure is None:
        return ""
    return str(failure) if isinstance(failure, TransferError) else f"{type(failure).__name__}: {failure}"
