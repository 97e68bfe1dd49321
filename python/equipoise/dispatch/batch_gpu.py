"""Dispatch by the batch on a GPU: launches the kernels over buffers of fixed address."""

from __future__ import annotations

import torch
import triton

from equipoise.dispatch.choice import Batch
from equipoise.dispatch.policy import DispatchPolicy
from equipoise.dispatch.scopes import GatherCounts
from equipoise.dispatch.solver.controls import ROTATION, ROTATION_MASK
from equipoise.dispatch.solver.kernels import assign, count_and_solve, solve_gathered
from equipoise.dispatch.solver.solve_numba import MOMENTUM
from equipoise.dispatch.tables import DispatchTables, power_of_two
from equipoise.topology import EpTopology

BLOCK = 256
"""Ids a program counts and assigns: 4096 tokens of top-8 make 128 blocks, which run at once on any GPU of this size."""
_BLOCKS_AT_ONCE = 16  # counts of earlier blocks that a program adds up in one round
_EVERYTHING = (1 << 31) - 1


class TritonBatchDispatch:
    """Solves and assigns with Triton; nothing waits for the device.

    Args:
        tables: of the live placement; their device holds all buffers.
        policy: its scope and costs.
        rank: this rank.
        gather: counts of the scope's ranks, on the device, and capturable where graphs are captured.
        max_ids: choices in the largest batch, for which buffers are made ahead.
    """

    def __init__(
        self,
        tables: DispatchTables,
        policy: DispatchPolicy,
        topology: EpTopology,
        rank: int,
        gather: GatherCounts | None,
        *,
        max_ids: int = 16384 * 16,
    ) -> None:
        self._tables = tables
        self._policy = policy
        self._topology = topology
        self._rank = rank
        self._gather = gather
        self._ranks = policy.ranks_of_scope(topology, rank)
        device = tables.device.expert.device
        _, rows, width = tables.device.slot.shape
        depth, padded_ranks = tables.device.singles_of_rank.shape[1:]
        self._sizes = {"E": tables.num_experts, "EP": power_of_two(tables.num_experts + 1), "M": rows, "C": width}
        self._solve_sizes = {"D": depth, "G": padded_ranks}
        # One warp reduces with shuffles alone; wide tiles need the registers of more.
        self._warps = 1 if rows * width <= 256 else 4 if rows * width <= 2048 else 8

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self._controls = torch.from_numpy(policy.controls(topology, rank)).to(device)
        self._momentum = torch.from_numpy(MOMENTUM).to(device, torch.int32)
        self._everything = torch.full((), _EVERYTHING // 64, dtype=torch.int32, device=device)
        self._block_counts = zeros(triton.cdiv(max_ids, BLOCK), self._sizes["EP"])
        self._totals, self._before, self._finished = zeros(self._sizes["EP"]), zeros(self._sizes["EP"]), zeros(1)
        self.quotas, self._inverses, self._starts = zeros(rows, width), zeros(rows, width), zeros(2, rows)

    def dispatch(self, batch: Batch) -> torch.Tensor:
        """See ``choice.Choice``."""
        scope, own = batch.rows(self._ranks.start, self._ranks.stop), batch.rows(self._rank, self._rank + 1)
        ids, first, last = batch.ids[scope].contiguous(), own.start - scope.start, own.stop - scope.start
        width = ids.shape[1]
        counts, num_unpadded = batch.counts, batch.num_unpadded
        if num_unpadded is not None and scope.start:
            num_unpadded = num_unpadded - scope.start
        num_blocks = max(triton.cdiv(ids.numel(), BLOCK), 1)
        if num_blocks > len(self._block_counts):
            self._block_counts = self._block_counts.new_zeros(num_blocks, self._sizes["EP"])
        unpadded = self._everything if num_unpadded is None else num_unpadded
        layer = self._tables.layer(batch.layer_id)
        solved = (layer.expert, layer.num_choices, layer.rank, layer.weight, layer.colour, layer.step,
                  layer.choices_of_rank, layer.singles_of_rank, layer.sizes, self._controls, self._momentum,
                  self.quotas, self._inverses, self._starts)  # fmt: skip
        alone = batch.bounds is not None or len(self._ranks) == 1
        count_and_solve[(num_blocks,)](
            ids, ids.numel(), width, unpadded, self._block_counts, self._totals, self._finished, *solved,
            **self._sizes, **self._solve_sizes, BLOCK=BLOCK, SOLVE=alone, num_warps=self._warps,
        )  # fmt: skip
        if not alone:
            assert self._gather is not None, "tokens of other ranks are needed: pass bounds, or a way to gather counts"
            gathered = self._gather(self._totals[: self._sizes["E"]])
            solve_gathered[(1,)](
                gathered, len(self._ranks), self._rank - self._ranks.start, self._totals, self._before, *solved,
                **self._sizes, **self._solve_sizes, num_warps=self._warps,
            )  # fmt: skip
        slots = torch.empty_like(ids)
        assign[(num_blocks,)](
            ids, slots, ids.numel(), width, unpadded, self._block_counts, self._before, layer.row_of_expert,
            layer.slot_of_expert, layer.slot, self._inverses, self._starts,
            self._finished if counts is None else counts[batch.layer_id], 0 if counts is None else counts.shape[1] - 1,
            first * width, last * width, **self._sizes, BLOCK=BLOCK, ROWS=_BLOCKS_AT_ONCE, GATHERED=not alone,
            RECORD=counts is not None,
        )  # fmt: skip
        return slots[first:last]

    def advance(self, _num_tokens: int) -> None:
        """Lets the next step round in favour of other replicas; on the device, so that a graph does not freeze it."""
        rotation = self._controls[ROTATION]
        rotation.add_(self._policy.num_scopes(self._topology)).bitwise_and_(ROTATION_MASK)
