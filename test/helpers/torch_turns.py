"""``static`` and ``dynamic`` in torch: the reference of the compiled loops and of the Triton kernel."""

from __future__ import annotations

import torch

from equipoise.dispatch.choice import Batch
from equipoise.dispatch.replicas import sample_replicas, weyl_uniform
from equipoise.dispatch.turns import TurnsTables
from equipoise.load.recorder import count_slots


class TorchTurns:
    """See ``choice.Choice``."""

    def __init__(self, tables: TurnsTables) -> None:
        self._tables = tables
        self._next_token = torch.zeros((), dtype=torch.int64, device=tables.cdf.device)

    def dispatch(self, batch: Batch) -> torch.Tensor:
        tables = self._tables
        layer_id, counts = batch.layer_id, batch.counts
        mine = batch.without_padding()[batch.rows(tables.rank, tables.rank + 1)]
        real = (mine >= 0) & (mine < tables.metadata.num_logical_experts)
        experts = torch.where(real, mine, 0).long()
        if tables.nearest is not None:
            slots = tables.nearest[layer_id][experts]
        else:
            number = self._next_token + torch.arange(len(mine), device=mine.device)
            uniform = weyl_uniform(number, mine.shape[1], layer_id=layer_id, rank=tables.rank)
            maps = tables.metadata.logical_to_physical_map[layer_id]
            slots = sample_replicas(experts, uniform, maps, tables.cdf[layer_id])
        slots = torch.where(real, slots, -1).to(mine.dtype)
        if counts is not None:
            count_slots(counts[layer_id], slots)
        return slots

    def advance(self, num_tokens: int) -> None:
        self._next_token += num_tokens
