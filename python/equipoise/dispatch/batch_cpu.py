"""Dispatch by the batch on a CPU."""

from __future__ import annotations

import numpy as np
import torch

from equipoise.dispatch.choice import Batch, HostCounts
from equipoise.dispatch.policy import DispatchPolicy
from equipoise.dispatch.scopes import GatherCounts
from equipoise.dispatch.solver.assign_numba import dispatch_batch
from equipoise.dispatch.solver.controls import ROTATION, ROTATION_MASK
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
        self._alone = np.zeros((0, tables.num_experts), dtype=np.int32)
        self._controls = policy.controls(topology, rank)
        self._host_counts = HostCounts()
        # Counts and loads are int32 in fixed point; see TableArrays.sizes.
        self._most_ids = (1 << 30) // tables.host.slot.shape[2] // len(self._ranks)

    def dispatch(self, batch: Batch) -> torch.Tensor:
        """See ``choice.Choice``."""
        # Views are made in numpy: in torch each would take as long as the solve of a small batch.
        scope, own = batch.rows(self._ranks.start, self._ranks.stop), batch.rows(self._rank, self._rank + 1)
        array = batch.host_rows(scope)
        if batch.bounds is None:
            gathered, row = self._counts_of_scope(array), self._rank - self._ranks.start
        else:
            gathered, row = self._alone, 0
        if array.size > self._most_ids:
            raise ConfigError(
                f"a batch of {array.size} choices is more than dispatch by the batch can count "
                f"({self._most_ids} a rank of its scope)",
                field="ep_dispatch_algorithm",
            )
        slots = np.empty((own.stop - own.start, array.shape[1]), dtype=array.dtype)
        dispatch_batch(
            batch.layer_id,
            array,
            own.start - scope.start,
            own.stop - scope.start,
            gathered,
            row,
            self._controls,
            self._host_counts.array(batch.counts),
            slots,
            *self._tables.host,
        )
        return torch.from_numpy(slots)

    def advance(self, _num_tokens: int) -> None:
        """Lets the next step round in favour of other replicas."""
        self._controls[ROTATION] = (int(self._controls[ROTATION]) + self._num_scopes) & ROTATION_MASK

    def _counts_of_scope(self, ids: np.ndarray) -> np.ndarray:
        if len(self._ranks) == 1:
            return self._alone
        assert self._gather is not None, "tokens of other ranks are needed: pass bounds, or a way to gather counts"
        valid = ids[(ids >= 0) & (ids < self._tables.num_experts)]
        counts = np.bincount(valid, minlength=self._tables.num_experts).astype(np.int32)
        return self._gather(torch.from_numpy(counts)).numpy()
