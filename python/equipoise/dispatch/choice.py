"""Choice: a way to choose replicas on one kind of device; Batch, what it gets; HostCounts, what it counts in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

_NOBODY_COUNTS = np.zeros((0, 0), dtype=np.int32)


class Batch(NamedTuple):
    """A layer's expert choices: this rank's own, or with ``bounds`` those of all ranks."""

    layer_id: int
    ids: torch.Tensor  # (T, K) logical experts, a row for each token; -1 for none
    bounds: Sequence[int] | None = None  # (G + 1) where each rank's tokens begin and end
    counts: torch.Tensor | None = None  # as for ExpertDispatcher.dispatch
    num_unpadded: torch.Tensor | None = None  # one integer on the device of ids: tokens from this number on are padding

    def without_padding(self) -> torch.Tensor:
        """(T, K) ids, those of padding -1."""
        if self.num_unpadded is None:
            return self.ids
        rows = torch.arange(self.ids.shape[0], device=self.ids.device)
        return torch.where((rows < self.num_unpadded)[:, None], self.ids, -1)

    def host_rows(self, rows: slice) -> np.ndarray:
        """(n, K) ids of these rows on a CPU, in C order: for another order kernels would be compiled in mid-step."""
        return np.ascontiguousarray(self.without_padding().numpy()[rows])

    def rows(self, first_rank: int, last_rank: int) -> slice:
        """The tokens of ranks first_rank..last_rank-1: all, where they are the own ones."""
        if self.bounds is None:
            return slice(0, self.ids.shape[0])
        return slice(self.bounds[first_rank], self.bounds[last_rank])


class HostCounts:
    """Counts on a CPU as the array that kernels add to; the last one is kept, since a view takes microseconds."""

    def __init__(self) -> None:
        self._counts: torch.Tensor | None = None
        self._array = _NOBODY_COUNTS

    def array(self, counts: torch.Tensor | None) -> np.ndarray:
        """(L, P + 1) int32 that shares the memory of ``counts``; (0, 0) where nobody counts."""
        if counts is None:
            return _NOBODY_COUNTS
        if counts is not self._counts:
            self._counts, self._array = counts, counts.numpy()
        return self._array


class Choice(Protocol):
    """One way to choose replicas."""

    def dispatch(self, batch: Batch) -> torch.Tensor:
        """(n, K) slots of this rank's tokens, in the dtype of the ids; -1 for none."""
        ...

    def advance(self, num_tokens: int, /) -> None:
        """Ends a step of so many tokens."""
        ...
