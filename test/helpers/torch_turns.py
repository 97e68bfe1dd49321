"""``static`` and ``dynamic`` in torch: the reference of the compiled loops and of the Triton kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from equipoise.dispatch.replicas import sample_replicas, weyl_uniform
from equipoise.dispatch.turns import TurnsTables, own_part, without_padding
from equipoise.load.recorder import count_slots


class TorchTurns:
    """See ``dispatcher.Choice``."""

    def __init__(self, tables: TurnsTables) -> None:
        self._tables = tables
        self._next_token = torch.zeros((), dtype=torch.int64, device=tables.cdf.device)

    def dispatch(
        self,
        layer_id: int,
        ids: torch.Tensor,
        width: int,
        bounds: Sequence[int] | None,
        counts: torch.Tensor | None,
        num_unpadded: torch.Tensor | None,
    ) -> torch.Tensor:
        tables = self._tables
        mine = own_part(without_padding(ids, width, num_unpadded), width, bounds, tables.rank).reshape(-1, width)
        real = (mine >= 0) & (mine < tables.metadata.num_logical_experts)
        experts = torch.where(real, mine, 0).long()
        if tables.nearest is not None:
            slots = tables.nearest[layer_id][experts]
        else:
            number = self._next_token + torch.arange(len(mine), device=mine.device)
            uniform = weyl_uniform(number, width, layer_id=layer_id, rank=tables.rank)
            maps = tables.metadata.logical_to_physical_map[layer_id]
            slots = sample_replicas(experts, uniform, maps, tables.cdf[layer_id])
        slots = torch.where(real, slots, -1).to(ids.dtype)
        if counts is not None:
            count_slots(counts[layer_id], slots)
        return slots.flatten()

    def advance(self, num_tokens: int) -> None:
        self._next_token += num_tokens
