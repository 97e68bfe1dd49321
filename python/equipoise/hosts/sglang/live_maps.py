"""SGLang's own live maps, written in place: captured CUDA graphs hold their addresses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from equipoise.dispatch.replicas import nearest_replicas
from equipoise.hosts.sglang.share_table import even_table, share_table
from equipoise.placement.metadata import ExpertLocationMetadata


class SglangMaps:
    """Writes layers of a placement into SGLang's ``ExpertLocationMetadata``, in two steps.

    Hazard: without an a2a backend all ranks must choose the same replica for a token. Which expert a slot holds changes
    with the weights, on all ranks or on none, by their vote. Shares are changed by each rank for itself; one that
    fails to would choose otherwise. So :meth:`write` leaves moved layers with even turns, and :meth:`write_shares`
    follows once all ranks are known to have come through.

    Args:
        live: SGLang's object; its tensors have a row for every layer, dense ones too.
        rank: of this process in the expert-parallel group, for ``static`` dispatch.
    """

    def __init__(self, live: Any, *, rank: int) -> None:
        self._live = live
        self._rank = rank

    def physical_to_logical(self, layer_ids: Sequence[int]) -> np.ndarray:
        """(L, P) int64 of these layers, from the copy on the CPU."""
        return self._live.physical_to_logical_map_cpu[list(layer_ids)].numpy().astype(np.int64)

    def write(self, layer_ids: Sequence[int], placement: ExpertLocationMetadata, rows: Sequence[int]) -> None:
        """Takes over ``placement``'s ``rows`` as SGLang's ``layer_ids`` where slots hold other experts now.

        Args:
            placement: on the CPU.
        """
        for layer_id, row in zip(layer_ids, rows, strict=True):
            p2l = placement.physical_to_logical_map[row]
            if not torch.equal(self._live.physical_to_logical_map_cpu[layer_id].long(), p2l):
                self._write_layer(layer_id, placement, p2l)

    def _write_layer(self, layer_id: int, placement: ExpertLocationMetadata, p2l: torch.Tensor) -> None:
        live = self._live
        even = torch.from_numpy(even_table(p2l.numpy(), placement.num_logical_experts))
        live.physical_to_logical_map[layer_id].copy_(p2l)
        live.physical_to_logical_map_cpu[layer_id].copy_(p2l)
        # The CPU copy is what SGLang loads weights by: each slot once.
        _fill_row(live.logical_to_all_physical_map_cpu[layer_id], even)
        if live.logical_to_rank_dispatch_physical_map is not None:
            near = nearest_replicas(even, placement.topology, self._rank)
            live.logical_to_rank_dispatch_physical_map[layer_id].copy_(near)
        self._write_table(layer_id, even)

    def write_shares(self, layer_id: int, placement: ExpertLocationMetadata, row: int) -> None:
        """Has the ``dynamic`` dispatch of a layer follow the placement's weights; ``static`` has no use for them."""
        if self._live.logical_to_rank_dispatch_physical_map is not None:
            return
        p2l, weights = placement.physical_to_logical_map[row].numpy(), placement.dispatch_weights[row].numpy()
        self._write_table(layer_id, torch.from_numpy(share_table(p2l, weights, placement.num_logical_experts)))

    def _write_table(self, layer_id: int, table: torch.Tensor) -> None:
        _fill_row(self._live.logical_to_all_physical_map[layer_id], table)
        self._live.logical_to_all_physical_map_num_valid[layer_id].copy_((table >= 0).sum(-1))


def _fill_row(row: torch.Tensor, table: torch.Tensor) -> None:
    """(E, P) row := (E, X) table, -1 beyond it; only the table crosses to the device."""
    row[:, : table.shape[1]].copy_(table)
    row[:, table.shape[1] :].fill_(-1)
