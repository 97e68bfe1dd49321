"""Defines what holds the experts of one rank, live and staged, and carries out its commits.

Two kinds of host memory implement it. Where each layer has tensors of its own, a commit copies from staging into them
(:class:`~equipoise.transfer.memory.stacked.StackedExperts`). Where all layers share their rows, a commit exchanges rows
and copies nothing (:class:`~equipoise.transfer.memory.pooled.PooledExperts`).

Next to the weights of each expert lies its canary, one int64, unless verification is ``off``; it is a tensor like the
others and moves with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from equipoise.transfer.memory.staging import ExpertLayout, SendBuffer, StagedExpert
from equipoise.transfer.planning.rank_program import Copy


@runtime_checkable
class ExpertMemory(Protocol):
    """Holds the experts of one rank. Rows are (bytes,) uint8 views: one per tensor of the layer, the canary's last."""

    @property
    def device(self) -> torch.device: ...

    @property
    def layouts(self) -> Sequence[ExpertLayout]:
        """By layer."""
        ...

    @property
    def capacity(self) -> int:
        """Experts that may be staged at once."""
        ...

    @property
    def allocated_bytes(self) -> int:
        """Bytes held for staging now."""
        ...

    def reserve(self, num_slots: int) -> None:
        """Makes room for ``num_slots`` staged experts; what was staged before is lost.

        Raises:
            ConfigError: more than ``capacity``.
        """
        ...

    def release(self) -> None:
        """Gives back what staging can do without between two rebalances."""
        ...

    def live(self, layer_id: int, slot: int) -> list[torch.Tensor]:
        """Returns the rows that serve a slot now."""
        ...

    def staged(self, layer_id: int, index: int) -> StagedExpert:
        """Returns staging slot ``index``, laid out for an expert of the layer."""
        ...

    def send_buffer(self, layer_id: int, index: int) -> SendBuffer:
        """Returns the buffer in which the packed message of an expert of the layer is put together."""
        ...

    def commit(self, layer_id: int, copies: Sequence[Copy]) -> None:
        """Afterwards each slot holds what ``copies``, carried out one after the other, would leave in it."""
        ...

    def canaries(self, layer_id: int) -> list[int]:
        """Returns those of the layer's slots; empty without canaries."""
        ...

    def set_canaries(self, layer_id: int, values: Sequence[int]) -> None:
        """Writes the canary of each of the layer's slots."""
        ...
