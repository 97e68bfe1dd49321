"""Dispatch by the batch on a CPU."""

from __future__ import annotations

import torch

from equipoise.dispatch.choice import Batch, HostCounts
from equipoise.dispatch.policy import DispatchPolicy
from equipoise.dispatch.scopes import GatherCounts
from equipoise.dispatch.solver.assign_numba import dispatch_batch
from equipoise.dispatch.solver.controls import ROTATION, ROTATION_MASK
from equipoise.dispatch.solver.table_addresses import table_addresses
from equipoise.dispatch.tables import DispatchTables
from equipoise.errors import ConfigError
from equipoise.topology import EpTopology


class CpuBatchDispatch:
    """Solves and assigns with numba.

    Args:
        tables: of the live placement.
        policy: its scope and costs.
        rank: this rank.
        gather: counts of the scope's ranks; None where the caller always passes all tokens of the scope.
    """

    def __init__(
        self,
        tables: DispatchTables,
        policy: DispatchPolicy,
        topology: EpTopology,
        rank: int,
        gather: GatherCounts | None,
    ) -> None:
        self._tables = tables
        self._num_scopes = policy.num_scopes(topology)
        self._rank = rank
        self._gather = gather
        self._ranks = policy.ranks_of_scope(topology, rank)
        self._controls = policy.controls(topology, rank)
        self._addresses = table_addresses(tables.host, self._controls)
        self._host_counts = HostCounts((tables.num_layers, topology.num_slots + 1))
        # Counts and loads are int32 in fixed point; see TableArrays.sizes.
        self._most_ids = (1 << 30) // tables.host.slot.shape[2] // len(self._ranks)

    def dispatch(self, batch: Batch) -> torch.Tensor:
        """See ``choice.Choice``."""
        ids = batch.int64_rows()
        scope, own = batch.rows(self._ranks.start, self._ranks.stop), batch.rows(self._rank, self._rank + 1)
        if own.start < scope.start or own.stop > scope.stop:
            raise batch.bad_bounds()
        width = ids.shape[1]
        num_choices = (scope.stop - scope.start) * width
        if num_choices > self._most_ids:
            raise ConfigError(
                f"a batch of {num_choices} choices is more than dispatch by the batch can count "
                f"({self._most_ids} a rank of its scope)",
                field="ep_dispatch_algorithm",
            )
        gathered = self._gathered(ids) if batch.bounds is None and len(self._ranks) > 1 else None
        slots = torch.empty((own.stop - own.start, width), dtype=torch.int64)
        recorded, num_columns = self._host_counts.place(batch.counts)
        dispatch_batch(
            batch.layer_id,
            ids.data_ptr(),
            scope.start,
            scope.stop,
            own.start,
            own.stop,
            width,
            0 if gathered is None else gathered.data_ptr(),
            0 if gathered is None else len(gathered),
            self._rank - self._ranks.start,
            recorded,
            num_columns,
            slots.data_ptr(),
            self._addresses,
        )
        return batch.in_dtype_of_ids(slots)

    def advance(self, _num_tokens: int) -> None:
        """Lets the next step round in favour of other replicas."""
        self._controls[ROTATION] = (int(self._controls[ROTATION]) + self._num_scopes) & ROTATION_MASK

    def _gathered(self, ids: torch.Tensor) -> torch.Tensor:
        """Collective. (ranks of the scope, E) int32 counts, in rank order."""
        assert self._gather is not None, "tokens of other ranks are needed: pass bounds, or a way to gather counts"
        num_experts = self._tables.num_experts
        valid = ids[(ids >= 0) & (ids < num_experts)]
        counts = self._gather(torch.bincount(valid, minlength=num_experts).to(torch.int32))
        assert counts.dtype == torch.int32
        assert counts.shape == (len(self._ranks), num_experts)
        return counts.contiguous()
