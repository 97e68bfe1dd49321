"""How ranks agree whether what they have staged may be committed: by a vote, which decides the same on all of them."""

from __future__ import annotations

import torch

from equipoise.distributed.communicator import Communicator
from equipoise.errors import InDoubtError, TransferError, TransferTimeout, VerificationError
from equipoise.transfer.execution.faults import FaultInjector

# A rank that failed at once votes at once, and waits for those that find out by their timeout. A vote that is given up
# too early would leave ranks in doubt whether the others committed; a rank that died is noticed without waiting.
VOTE_GRACE_SECONDS = 30.0

# What a rank votes; the highest one cast decides which error all of them raise.
_FINE, _FAILED, _TIMED_OUT, _NOT_WHAT_WAS_SENT = range(4)
_ERRORS = {_FAILED: TransferError, _TIMED_OUT: TransferTimeout, _NOT_WHAT_WAS_SENT: VerificationError}


class LayerVote:
    """The votes of one rank.

    Args:
        communicator: reaches the other ranks.
        patience: seconds after which a vote is given up: more than the slowest rank may take until it votes.
        faults: what goes wrong on purpose.
    """

    def __init__(self, communicator: Communicator, patience: float, faults: FaultInjector) -> None:
        self._communicator = communicator
        self._patience = patience
        self._faults = faults
        self.broken: str | None = None
        """Why no further transfer can run before :meth:`recover`; None while one can."""

    def cast(self, layer_id: int, failure: Exception | None) -> TransferError | None:
        """Collective. None if no rank failed, else the same kind of error on all of them.

        Args:
            layer_id: for the words of the error.
            failure: why this rank could not commit; None: it could.

        Raises:
            InDoubtError: the vote broke off; :attr:`broken` is set.
        """
        try:
            if self._faults.at("vote", layer_id) == "drop":
                self.broken = f"the vote on layer {layer_id} was not cast"
                raise InDoubtError(self.broken)
        except RuntimeError as error:
            failure = failure or error
        votes = torch.zeros(self._communicator.world_size, dtype=torch.int64)
        votes[self._communicator.rank] = _ballot(failure)
        words: list[str] = []
        try:
            self._communicator.all_reduce_sum_(votes, self._patience)
            if votes.any():
                words = self._communicator.all_gather_object(_words(failure), self._patience)
        except TransferError as error:
            reason = "" if failure is None else f"; this rank had failed before: {_words(failure)}"
            self.broken = f"the vote on layer {layer_id} broke off: {error}{reason}"
            raise InDoubtError(self.broken) from error
        if not words:
            return None
        worst = int(votes.max())
        told = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(words) if text)
        if ((votes == _FAILED) | (votes == _TIMED_OUT)).any():
            self._rebuild(told)
        result = _ERRORS[worst](f"layer {layer_id} was not migrated: {told}")
        result.__cause__ = failure
        return result

    def _rebuild(self, told: str) -> None:
        """Replaces the bulk transport, which a failed exchange may have left with half a message."""
        try:
            self._communicator.rebuild()
        except TransferError as error:
            self.broken = f"{error} (after: {told})"

    def recover(self) -> None:
        """Collective, with no rank inside a transfer: makes new groups.

        Raises:
            TransferError: there is no way to; :attr:`broken` says why.
        """
        try:
            self._communicator.rebuild(control=True)
        except TransferError as error:
            self.broken = f"{error} (after: {self.broken})"
            raise
        self.broken = None


def _ballot(failure: Exception | None) -> int:
    match failure:
        case None:
            return _FINE
        case VerificationError():
            return _NOT_WHAT_WAS_SENT
        case TransferTimeout():
            return _TIMED_OUT
        case _:
            return _FAILED


def _words(failure: Exception | None) -> str:
    if failure is None:
        return ""
    return str(failure) if isinstance(failure, TransferError) else f"{type(failure).__name__}: {failure}"
