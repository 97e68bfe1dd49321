"""Holds the experts of one rank in rows that all layers share: commits exchange rows and copy nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from equipoise.config import Verification
from equipoise.errors import ConfigError
from equipoise.topology import EpTopology
from equipoise.transfer.memory.host_weights import row_views, with_canary
from equipoise.transfer.memory.pool import ExpertPool
from equipoise.transfer.memory.staging import (
    ExpertLayout,
    SendBuffer,
    StagedExpert,
    StagingArea,
    staging_slots,
)
from equipoise.transfer.planning.rank_program import Copy, is_staging, staging_index


def allocate_pool(
    specs: Sequence[tuple[torch.Size, torch.dtype]],
    topology: EpTopology,
    num_layers: int,
    *,
    verification: Verification,
    staging_bytes: int | None,
    rounds_in_flight: int,
    device: torch.device,
) -> ExpertPool:
    """Allocates a pool with as many spare rows as staging may take; the weights are the caller's to fill in.

    Args:
        specs: shape and dtype of each tensor of an expert.
        staging_bytes: as for the ``ExpertLocationUpdater`` that will get the pool, like the
            other options; None: a row per round in flight.

    Raises:
        ConfigError: the budget does not hold one expert.
    """
    one = [torch.empty(1, *shape, dtype=dtype, device="meta") for shape, dtype in specs]
    layout = ExpertLayout.of(with_canary(one, verification), with_checksum=verification == "checksum")
    spare = staging_slots([layout], staging_bytes, rounds_in_flight, topology.slots_per_rank, rounds_in_flight)
    num_rows = num_layers * topology.slots_per_rank + spare
    tensors = [torch.zeros(num_rows, *shape, dtype=dtype, device=device) for shape, dtype in specs]
    return ExpertPool(tensors, num_layers, topology.slots_per_rank)


class PooledExperts:
    """An ``ExpertMemory`` whose staging slots are the pool's spare rows.

    Large rows land where they will be used. The packed message, checksum and small rows, lands in a receive buffer; a
    commit copies its few bytes.
    """

    def __init__(
        self, pool: ExpertPool, slots_per_rank: int, verification: Verification, *, num_send_buffers: int
    ) -> None:
        if pool.slots_per_rank != slots_per_rank:
            raise ConfigError(
                f"the expert pool has slots_per_rank={pool.slots_per_rank}, the topology {slots_per_rank}",
                field="expert_weights",
            )
        self.device = pool.device
        self._pool = pool
        tensors = with_canary(pool.tensors, verification)
        self._canary: torch.Tensor | None = tensors[-1] if verification != "off" else None  # type: ignore[assignment]
        self._row_views = [list(rows) for rows in zip(*(row_views(tensor) for tensor in tensors), strict=True)]
        self._layout = ExpertLayout.of(tensors, with_checksum=verification == "checksum")
        self.layouts = [self._layout] * pool.num_layers
        self._packed = [number for number, field in enumerate(self._layout.fields) if field.packed]
        self.capacity = min(pool.num_extra_rows, slots_per_rank)
        heads_only = replace(
            self._layout,
            fields=tuple(self._layout.fields[number] for number in self._packed),
            slot_bytes=self._layout.packed_bytes,
        )
        self._receive_buffers = StagingArea(
            [heads_only], None, self.capacity, self.capacity, num_send_buffers, self.device
        )

    @property
    def allocated_bytes(self) -> int:
        row_bytes = sum(row.numel() for row in self._row_views[0])
        return self._receive_buffers.allocated_bytes + self._pool.num_extra_rows * row_bytes

    def reserve(self, num_slots: int) -> None:
        self._receive_buffers.reserve(num_slots)

    def release(self) -> None:
        self._receive_buffers.release()

    def live(self, layer_id: int, slot: int) -> list[torch.Tensor]:
        return self._row_views[self._pool.rows(layer_id)[slot]]

    def staged(self, layer_id: int, index: int) -> StagedExpert:  # noqa: ARG002 - layers share their layout
        head, packed_rows, _ = self._receive_buffers.slot(0, index)
        rows = list(self._row_views[self._pool.spare_rows[index]])
        for number, row in zip(self._packed, packed_rows, strict=True):
            rows[number] = row
        large = [rows[number] for number in self._layout.large_fields]
        return StagedExpert(head, rows, [head, *large] if self._layout.packed_bytes else large)

    def send_buffer(self, layer_id: int, index: int) -> SendBuffer:  # noqa: ARG002
        head, packed_rows = self._receive_buffers.send_buffer(0, index)
        return SendBuffer(head, [(self._packed[number], row) for number, row in packed_rows])

    @torch.inference_mode()
    def commit(self, layer_id: int, copies: Sequence[Copy]) -> None:
        """Gives each slot the row that holds its new expert; two slots that hold the same expert may share one."""
        rows, spare = self._pool.rows(layer_id), self._pool.spare_rows
        origins = _origins(copies)
        new_rows = list(rows)
        for slot, origin in origins.items():
            new_rows[slot] = spare[staging_index(origin)] if is_staging(origin) else rows[origin]
        for origin in set(origins.values()):
            if is_staging(origin):
                self._unpack(layer_id, staging_index(origin))
        self._pool.assign(layer_id, new_rows)

    def canaries(self, layer_id: int) -> list[int]:
        if self._canary is None:
            return []
        return [int(value) for value in self._canary[self._pool.row_of_slot[layer_id]].tolist()]

    @torch.inference_mode()
    def set_canaries(self, layer_id: int, values: Sequence[int]) -> None:
        if self._canary is not None:
            self._canary[self._pool.row_of_slot[layer_id]] = torch.tensor(values, device=self.device)

    def _unpack(self, layer_id: int, index: int) -> None:
        """Moves the small rows of a staged expert from the receive buffer to where the large ones are."""
        staged, final = self.staged(layer_id, index).rows, self._row_views[self._pool.spare_rows[index]]
        for number in self._packed:
            final[number].copy_(staged[number])


def _origins(copies: Sequence[Copy]) -> Mapping[int, int]:
    """Slot to the place whose content it ends up with, for those that end up with another's.

    ``copies`` may go by way of a spare staging slot, and pass on what an earlier one has brought.
    """
    holds: dict[int, int] = {}
    for copy in copies:
        holds[copy.destination] = holds.get(copy.source, copy.source)
    return {place: origin for place, origin in holds.items() if not is_staging(place) and origin != place}
