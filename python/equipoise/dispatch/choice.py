"""Choice: one way to choose replicas, on one kind of device; and Batch, what it chooses for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch


class Batch(NamedTuple):
    """A layer's expert choices: this rank's own, or with ``bounds`` those of all ranks."""

    layer_id: int
    ids: torch.Tensor  # (N,) logical experts, those of a token side by side; -1 for none
    width: int  # experts of a token
    bounds: Sequence[int] | None = None  # (G + 1) where each rank's tokens begin and end
    counts: torch.Tensor | None = None  # as for ExpertDispatcher.dispatch
    num_unpadded: torch.Tensor | None = None  # one integer on the device of ids: tokens from this number on are padding

    def without_padding(self) -> torch.Tensor:
        """(N,) ids, those of padding -1."""
        if self.num_unpadded is None:
            return self.ids
        return torch.where(
            torch.arange(len(self.ids), device=self.ids.device) < self.num_unpadded * self.width, self.ids, -1
        )

    def span(self, ranks: range) -> slice:
        """Where the ids of consecutive ranks lie: all of them, where they are the own ones."""
        if self.bounds is None:
            return slice(0, self.ids.numel())
        return slice(self.bounds[ranks.start] * self.width, self.bounds[ranks.stop] * self.width)

    def span_of_rank(self, rank: int) -> slice:
        """Where the ids of one rank lie."""
        return self.span(range(rank, rank + 1))


class Choice(Protocol):
    """One way to choose replicas."""

    def dispatch(self, batch: Batch) -> torch.Tensor:
        """(n,) slots of this rank's part of the batch, in the dtype of its ids; -1 for none."""
        ...

    def advance(self, num_tokens: int, /) -> None:
        """Ends a step of so many tokens."""
        ...
