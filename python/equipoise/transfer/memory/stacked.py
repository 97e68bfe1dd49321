"""Where the experts of one rank lie, live and staged, and what a commit does to them.

Two kinds of host memory, one interface. Where each layer has tensors of its own, a commit copies from staging into them
(:class:`StackedExperts`). Where all layers share their rows, a commit exchanges rows and copies nothing
(:class:`~equipoise.transfer.memory.pooled.PooledExperts`).

Next to the weights of each expert lies its canary, one int64, unless verification is ``off``; it is a tensor like the
others and moves with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from equipoise.transfer.memory.staging import (
    ExpertLayout,
    SendBuffer,
    StagedExpert,
    StagingArea,
    require_usable,
    row_views,
)
from equipoise.transfer.memory.verification import Verification
from equipoise.transfer.planning.rank_program import Copy, is_staging, staging_index


class ExpertMemory(Protocol):
    """The experts of one rank. Rows are (bytes,) uint8 views: one per tensor of the layer, the canary's last."""

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
        """The rows that serve a slot now."""
        ...

    def staged(self, layer_id: int, index: int) -> StagedExpert:
        """Staging slot ``index``, laid out for an expert of the layer."""
        ...

    def send_buffer(self, layer_id: int, index: int) -> SendBuffer:
        """Where the packed message of an expert of the layer is put together."""
        ...

    def commit(self, layer_id: int, copies: Sequence[Copy]) -> None:
        """Afterwards each slot holds what ``copies``, carried out one after the other, would leave in it."""
        ...

    def canaries(self, layer_id: int) -> list[int]:
        """Of the layer's slots; empty without canaries."""
        ...

    def set_canaries(self, layer_id: int, values: Sequence[int]) -> None: ...


def with_canary(tensors: Sequence[torch.Tensor], verification: Verification) -> list[torch.Tensor]:
    """``tensors`` and, unless verification is ``off``, the int64 canaries of their rows behind them.

    They are zero until a plan has said what the slots hold.
    """
    if verification == "off":
        return list(tensors)
    return [*tensors, torch.zeros(tensors[0].shape[0], dtype=torch.int64, device=tensors[0].device)]


class StackedExperts:
    """Each layer has its own tensors, (slots_per_rank, ...) each, row ``i`` for slot ``i``; commits copy into them.

    Args:
        expert_weights: ``[layer][i]``.
        verification, staging_bytes, rounds_in_flight: see ``ExpertLocationUpdater``.

    Raises:
        ConfigError: unusable tensors, or a budget below one expert.
    """

    def __init__(
        self,
        expert_weights: Sequence[Sequence[torch.Tensor]],
        slots_per_rank: int,
        verification: Verification,
        staging_bytes: int | None,
        rounds_in_flight: int,
    ) -> None:
        require_usable(expert_weights, slots_per_rank)
        self.device = expert_weights[0][0].device if expert_weights else torch.device("cpu")
        weights = [with_canary(tensors, verification) for tensors in expert_weights]
        self._canaries = [tensors[-1] for tensors in weights] if verification != "off" else []
        self._rows = [
            [list(rows) for rows in zip(*(row_views(tensor) for tensor in tensors), strict=True)] for tensors in weights
        ]
        self.layouts = [ExpertLayout.of(tensors, with_checksum=verification == "checksum") for tensors in weights]
        self._staging = StagingArea(
            self.layouts, staging_bytes, rounds_in_flight, slots_per_rank, rounds_in_flight, self.device
        )

    @property
    def capacity(self) -> int:
        return self._staging.capacity

    @property
    def allocated_bytes(self) -> int:
        return self._staging.allocated_bytes

    def reserve(self, num_slots: int) -> None:
        self._staging.reserve(num_slots)

    def release(self) -> None:
        self._staging.release()

    def live(self, layer_id: int, slot: int) -> list[torch.Tensor]:
        return self._rows[layer_id][slot]

    def staged(self, layer_id: int, index: int) -> StagedExpert:
        return self._staging.slot(layer_id, index)

    def send_buffer(self, layer_id: int, index: int) -> SendBuffer:
        return self._staging.send_buffer(layer_id, index)

    def commit(self, layer_id: int, copies: Sequence[Copy]) -> None:
        for copy in copies:
            targets, sources = self._rows_at(layer_id, copy.destination), self._rows_at(layer_id, copy.source)
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)

    def canaries(self, layer_id: int) -> list[int]:
        return [int(value) for value in self._canaries[layer_id].tolist()] if self._canaries else []

    def set_canaries(self, layer_id: int, values: Sequence[int]) -> None:
        if self._canaries:
            self._canaries[layer_id].copy_(torch.tensor(values))

    def _rows_at(self, layer_id: int, place: int) -> list[torch.Tensor]:
        return self.staged(layer_id, staging_index(place)).rows if is_staging(place) else self._rows[layer_id][place]
