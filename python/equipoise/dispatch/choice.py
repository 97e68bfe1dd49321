"""Choice: a way to choose replicas on one kind of device; Batch, what it gets; HostCounts, where a CPU counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from equipoise.errors import ConfigError, LoadError


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

    def int64_rows(self) -> torch.Tensor:
        """(T, K) ids in C order, those of padding -1: the batch's own tensor where it is that already."""
        ids = self.without_padding()
        if ids.dtype != torch.int64:
            ids = ids.long()
        return ids if ids.is_contiguous() else ids.contiguous()

    def in_dtype_of_ids(self, slots: torch.Tensor) -> torch.Tensor:
        """int64 slots in the dtype that the ids have."""
        return slots if self.ids.dtype == torch.int64 else slots.to(self.ids.dtype)

    def rows(self, first_rank: int, last_rank: int) -> slice:
        """The tokens of ranks first_rank..last_rank-1: all, where they are the own ones.

        Raises:
            ConfigError: the bounds are none of so many tokens.
        """
        num_tokens = self.ids.shape[0]
        if self.bounds is None:
            return slice(0, num_tokens)
        first, last = self.bounds[first_rank], self.bounds[last_rank]
        if not 0 <= first <= last <= num_tokens:
            raise self.bad_bounds()
        return slice(first, last)

    def bad_bounds(self) -> ConfigError:
        """The error to raise where bounds do not rise, or not to the number of tokens."""
        return ConfigError(
            f"rank_bounds must rise from 0 to the number of tokens, {len(self.ids)}, got {list(self.bounds or ())}",
            field="rank_bounds",
        )


class HostCounts:
    """Where kernels add up the slots; known of the last tensor, since to look at it takes microseconds.

    Args:
        shape: (L, P + 1) that counts must have.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self._shape = shape
        self._counts: torch.Tensor | None = None
        self._place = 0, 0

    def place(self, counts: torch.Tensor | None) -> tuple[int, int]:
        """Address and number of columns; 0, 0 where nobody counts.

        Raises:
            LoadError: they are of another shape, not int32, not in C order, or not on the CPU.
        """
        if counts is None:
            return 0, 0
        if counts is not self._counts:
            found = tuple(counts.shape), counts.dtype, counts.device.type
            if found != (self._shape, torch.int32, "cpu") or not counts.is_contiguous():
                raise LoadError(
                    f"counts must be contiguous int32 of shape {self._shape} on the CPU, got {counts.dtype} of shape "
                    f"{tuple(counts.shape)} with strides {counts.stride()} on {counts.device}",
                    field="counts",
                )
            self._counts, self._place = counts, (counts.data_ptr(), counts.shape[1])
        return self._place


class Choice(Protocol):
    """One way to choose replicas."""

    def dispatch(self, batch: Batch) -> torch.Tensor:
        """(n, K) slots of this rank's tokens, in the dtype of the ids; -1 for none."""
        ...

    def advance(self, num_tokens: int, /) -> None:
        """Ends a step of so many tokens."""
        ...
