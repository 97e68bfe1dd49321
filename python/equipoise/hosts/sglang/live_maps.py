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
    """Writes layers of a placement into SGLang's ``ExpertLocationMetadata``.

    Args:
        live: SGLang's object; its tensors have a row for every layer, dense ones too.
        rank: of this process in the expert-parallel group, for ``static`` dispatch.
        weighted: whether dispatch follows our shares; replicas take even turns otherwise.
    """

    def __init__(self, live: Any, *, rank: int, weighted: bool = True) -> None:
        self._live = live
        self._rank = rank
        self._weighted = weighted

    def physical_to_logical(self, layer_ids: Sequence[int]) -> np.ndarray:
        """(L, P) int64 of these layers, from the copy on the CPU."""
        return self._live.physical_to_logical_map_cpu[list(layer_ids)].numpy().astype(np.int64)

    def write(self, layer_ids: Sequence[int], placement: ExpertLocationMetadata, rows: Sequence[int]) -> None:
        """Takes over ``placement``'s ``rows`` as SGLang's ``layer_ids``, between two forward passes.

        Args:
            placement: on the CPU.
        """
        for layer_id, row in zip(layer_ids, rows, strict=True):
            self._write_layer(layer_id, placement, row)

    def _write_layer(self, layer_id: int, placement: ExpertLocationMetadata, row: int) -> None:
        live, num_experts = self._live, placement.num_logical_experts
        p2l = placement.physical_to_logical_map[row]
        live.physical_to_logical_map[layer_id].copy_(p2l)
        live.physical_to_logical_map_cpu[layer_id].copy_(p2l)
        even = torch.from_numpy(even_table(p2l.numpy(), num_experts))
        # The CPU copy is what SGLang loads weights by: each slot once.
        _fill_row(live.logical_to_all_physical_map_cpu[layer_id], even)
        if live.logical_to_rank_dispatch_physical_map is not None:
            near = nearest_replicas(even, placement.topology, self._rank)
            live.logical_to_rank_dispatch_physical_map[layer_id].copy_(near)
        table = even
        if self._weighted and live.logical_to_rank_dispatch_physical_map is None:
            weights = placement.dispatch_weights[row].numpy()
            table = torch.from_numpy(share_table(p2l.numpy(), weights, num_experts))
        _fill_row(live.logical_to_all_physical_map[layer_id], table)
        live.logical_to_all_physical_map_num_valid[layer_id].copy_((table >= 0).sum(-1))


def _fill_row(row: torch.Tensor, table: torch.Tensor) -> None:
    """(E, P) row := (E, X) table, -1 beyond it; only the table crosses to the device."""
    row[:, : table.shape[1]].copy_(table)
    row[:, table.shape[1] :].fill_(-1)
