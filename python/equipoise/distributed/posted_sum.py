"""Sums over all ranks between two polls of a host, overlapped with its forward pass."""

from __future__ import annotations

import torch

from equipoise.distributed.protocol import Communicator, Pending

_SLOWEST_STEP_SECONDS = 600.0
"""How long a rank may take from one poll to the next."""


class SumBetweenPolls:
    """Posted in one poll, read in the next, so that nobody waits for the slowest rank."""

    def __init__(self) -> None:
        self._under_way: tuple[torch.Tensor, Pending] | None = None

    def post(self, communicator: Communicator, values: list[int]) -> None:
        """Collective: this rank's part of the next sum. The one before has been taken."""
        assert self._under_way is None
        tensor = torch.tensor(values, dtype=torch.int64)
        self._under_way = tensor, communicator.post_sum(tensor)

    def take(self) -> list[int] | None:
        """Collective: the sum of what all ranks posted last; None if nothing is under way.

        Raises:
            TransferError: the ranks cannot talk any more.
        """
        if self._under_way is None:
            return None
        (tensor, pending), self._under_way = self._under_way, None
        pending.wait(_SLOWEST_STEP_SECONDS)
        values: list[int] = tensor.tolist()
        return values
