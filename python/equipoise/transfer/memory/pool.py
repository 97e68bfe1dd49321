"""Keeps expert weights of all layers of a rank in common rows, of which any may serve any slot.

A host whose kernels find an expert by row number (base address plus row times stride, as grouped and fused MoE kernels
do) can hand its experts over in this form. Experts then land in a row that nobody reads yet, a commit writes row
numbers, and the rows that it frees take the next experts: no weight is copied within a rank, and no memory is needed
beyond that of staging, since the spare rows serve all layers in turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from equipoise.errors import ConfigError


class ExpertPool:
    """Rows for ``num_layers * slots_per_rank`` slots and some to spare.

    At first slot ``s`` of layer ``l`` is served by row ``l * slots_per_rank + s``: there its weights are loaded to.

    Args:
        tensors: (num_rows, ...) each, contiguous, on one device, of any dtype: row ``r`` of all of them is one expert.
        num_layers: MoE layers; their experts have the same shapes.
        slots_per_rank: slots of each.

    Raises:
        ConfigError: no tensors, tensors that do not fit together, or not a single row to spare.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], num_layers: int, slots_per_rank: int) -> None:
        _require_usable(tensors, num_layers * slots_per_rank)
        self.tensors = tuple(tensors)
        self.num_layers, self.slots_per_rank = num_layers, slots_per_rank
        self.num_rows = tensors[0].shape[0]
        in_use = num_layers * slots_per_rank
        with torch.inference_mode(mode=False):  # or commits outside of it could not write the table
            self.row_of_slot = torch.arange(in_use, device=self.device).view(num_layers, slots_per_rank)
        """(num_layers, slots_per_rank) int64 on the device: what a forward pass reads. Commits write it in place."""
        self._rows = self.row_of_slot.tolist()
        self.spare_rows = list(range(in_use, self.num_rows))
        """Rows that serve no slot; more of them where slots of a layer hold the same expert and share a row."""

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def num_extra_rows(self) -> int:
        """Rows beyond one for each slot: as many are spare at any time, or more."""
        return self.num_rows - self.num_layers * self.slots_per_rank

    def rows(self, layer_id: int) -> list[int]:
        """Returns the row of each slot of a layer."""
        return list(self._rows[layer_id])

    def assign(self, layer_id: int, rows: Sequence[int]) -> None:
        """Makes ``rows`` serve the layer's slots from the next forward pass on; rows that serve none become spare.

        Args:
            rows: (slots_per_rank,), each one the layer's or spare.
        """
        free = {*self._rows[layer_id], *self.spare_rows}
        assert len(rows) == self.slots_per_rank, f"{rows=}"
        assert free.issuperset(rows), f"{rows=} {free=}"
        self._rows[layer_id] = list(rows)
        self.spare_rows = sorted(free.difference(rows))
        self.row_of_slot[layer_id].copy_(torch.tensor(rows), non_blocking=True)


def _require_usable(tensors: Sequence[torch.Tensor], in_use: int) -> None:
    if not tensors:
        raise ConfigError("an expert pool needs at least one tensor", field="expert_weights")
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len({tensor.shape[0] for tensor in tensors}) > 1 or len({tensor.device for tensor in tensors}) > 1:
        devices = [str(tensor.device) for tensor in tensors]
        raise ConfigError(
            f"tensors of an expert pool must agree in rows and device: shapes {shapes} on {devices}",
            field="expert_weights",
        )
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ConfigError(f"tensors of an expert pool must be contiguous: shapes {shapes}", field="expert_weights")
    if tensors[0].shape[0] <= in_use:
        raise ConfigError(
            f"an expert pool of {tensors[0].shape[0]} rows has none to spare: its slots need {in_use}",
            field="expert_weights",
        )
