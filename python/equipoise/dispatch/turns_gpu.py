"""``static`` and ``dynamic`` on a GPU: one launch a layer and batch, over buffers of fixed address."""

from __future__ import annotations

import torch
import triton

from equipoise.dispatch.choice import Batch
from equipoise.dispatch.turns import TurnsTables
from equipoise.dispatch.turns_kernel import choose

BLOCK = 64
"""Ids of a program, which is one warp: 4096 tokens of top-8 make 512 programs, one for each scheduler of an H100."""


class TritonTurns:
    """Chooses and counts with Triton; nothing waits for the device.

    A captured graph follows what lies in buffers: the maps, the weights, the number of the next token and the number of
    tokens that are no padding.
    """

    def __init__(self, tables: TurnsTables) -> None:
        metadata = tables.metadata
        self._tables = tables
        self._turns = tables.nearest is None
        self._table = metadata.logical_to_physical_map if tables.nearest is None else tables.nearest
        self._sizes = {"E": metadata.num_logical_experts, "X": metadata.max_replicas}
        self._next_token = torch.zeros(1, dtype=torch.int64, device=tables.cdf.device)

    def dispatch(self, batch: Batch) -> torch.Tensor:
        """See ``choice.Choice``."""
        rank, ids, counts = self._tables.rank, batch.ids.contiguous(), batch.counts
        unpadded = self._next_token if batch.num_unpadded is None else batch.num_unpadded
        own, width = batch.rows(rank, rank + 1), ids.shape[1]
        slots = ids.new_empty(own.stop - own.start, width)
        num_ids = slots.numel()
        if num_ids:
            choose[(triton.cdiv(num_ids, BLOCK),)](
                ids, slots, num_ids, own.start, unpadded, batch.layer_id, rank,
                self._next_token, self._table, self._tables.cdf,
                self._next_token if counts is None else counts[batch.layer_id],
                0 if counts is None else counts.shape[1] - 1,
                **self._sizes, K=width, BLOCK=BLOCK, TURNS=self._turns, PADDED=batch.num_unpadded is not None,
                RECORD=counts is not None, num_warps=1,
            )  # fmt: skip
        return slots

    def advance(self, num_tokens: int) -> None:
        """Ends a step of so many tokens; on the device, so that a graph does not freeze it."""
        self._next_token += num_tokens
