"""ExpertDispatcher: from the logical experts of a batch to the slots that serve them.

``static`` takes the nearest replica, ``dynamic`` lets replicas take turns by planned weight (both in ``turns.py``),
``batch`` solves the shares on the tokens at hand (``quotas.py`` tells how). A choice also counts what it hands out,
where it is asked to. Nothing here allocates what outlives a step, and on a GPU nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch.autograd import profiler

from equipoise.config import EplbConfig
from equipoise.dispatch.batch_cpu import CpuBatchDispatch
from equipoise.dispatch.choice import Batch, Choice
from equipoise.dispatch.cost import active_expert_cost
from equipoise.dispatch.policy import DispatchPolicy
from equipoise.dispatch.scopes import GatherCounts, gather_by_sum
from equipoise.dispatch.tables import DispatchTables
from equipoise.dispatch.turns import CpuTurns, TurnsTables
from equipoise.distributed.communicator import Communicator
from equipoise.errors import ConfigError
from equipoise.placement.metadata import ExpertLocationMetadata


class ExpertDispatcher:
    """Dispatch for one rank over the live maps; sees a layer's new map once told of it by :meth:`refresh`.

    Args:
        metadata: the live placement, changed in place.
        rank: this rank.
        policy: what decides among replicas.
        gather: for ``batch`` in scope ``node`` or ``all``: how counts of the scope's ranks come together. Not needed
            where every call passes all ranks' tokens (``rank_bounds``).
        live_ranks: ranks that take tokens; all if None.

    Raises:
        ConfigError: no live rank, or one outside [0, G).
        PlacementError: an expert has no replica on a live rank.
    """

    def __init__(
        self,
        metadata: ExpertLocationMetadata,
        *,
        rank: int,
        policy: DispatchPolicy | None = None,
        gather: GatherCounts | None = None,
        live_ranks: Collection[int] | None = None,
    ) -> None:
        self.policy = policy if policy is not None else DispatchPolicy()
        topology, self._device = metadata.topology, metadata.physical_to_logical_map.device
        self._num_layers = metadata.num_layers
        on_cpu = self._device.type == "cpu"
        self._tables: DispatchTables | TurnsTables
        self._choice: Choice
        if self.policy.algorithm != "batch":
            nearest = self.policy.algorithm == "static"
            self._tables = turns = TurnsTables(metadata, rank, nearest=nearest, live_ranks=live_ranks)
            if on_cpu:
                self._choice = CpuTurns(turns)
            else:
                from equipoise.dispatch.turns_gpu import TritonTurns  # torch for CPUs comes without Triton

                self._choice = TritonTurns(turns)
            return
        self._tables = tables = DispatchTables(metadata, live_ranks=live_ranks)
        if on_cpu:
            self._choice = CpuBatchDispatch(tables, self.policy, topology, rank, gather)
        else:
            from equipoise.dispatch.batch_gpu import TritonBatchDispatch

            self._choice = TritonBatchDispatch(tables, self.policy, topology, rank, gather)

    @classmethod
    def from_config(
        cls, config: EplbConfig, metadata: ExpertLocationMetadata, communicator: Communicator
    ) -> ExpertDispatcher:
        """The dispatcher that the options name; counts are gathered over ``communicator`` where that is needed.

        Collective where the cost of an activated expert is ``auto``: rank 0's is taken, for weights of 2 bytes.
        """
        cost = 0.0
        if config.ep_dispatch_algorithm == "batch" and config.ep_dispatch_active_expert_cost == "auto":
            mine = active_expert_cost(metadata.physical_to_logical_map.device, bytes_per_parameter=2.0)
            cost = communicator.broadcast_object(mine, src=0)
        policy = DispatchPolicy.from_config(config, active_expert_cost=cost)
        ranks = policy.ranks_of_scope(metadata.topology, communicator.rank)
        return cls(metadata, rank=communicator.rank, policy=policy, gather=gather_by_sum(communicator, ranks))

    def dispatch(
        self,
        layer_id: int,
        topk_ids: torch.Tensor,
        *,
        rank_bounds: Sequence[int] | None = None,
        num_unpadded: torch.Tensor | int | None = None,
        counts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Slots for the chosen experts of this rank's tokens.

        Args:
            layer_id: MoE layer, 0-based.
            topk_ids: (T, K), (T,) or (..., K) logical experts of any integer dtype; -1 for "none".
            rank_bounds: where ``topk_ids`` holds every rank's tokens, (G + 1) bounds of their rows.
            num_unpadded: tokens from this number on are padding; a device scalar is not waited for.
            counts: (L, P + 1) int32 on the device of the maps: the slots are added to row ``layer_id``, "none" and
                padding in the last column (``ExpertDistributionRecorder.counts``).

        Returns:
            Slots of this rank's tokens, in the dtype of ``topk_ids`` and its shape but for rows of other ranks; -1 for
            "none" and for padding.

        Raises:
            ConfigError: ``layer_id`` or ``rank_bounds`` is out of range.
            LoadError: ``counts``, on a CPU, are of another shape, dtype or order.
        """
        if not 0 <= layer_id < self._num_layers:
            raise ConfigError(f"layer_id must be from 0 to {self._num_layers - 1}, got {layer_id}", field="layer_id")
        if num_unpadded is not None:
            num_unpadded = self._on_device(num_unpadded)
        if topk_ids.ndim == 2:  # as hosts have them: on a CPU two views would take as long as the choice itself
            return self._choose(Batch(layer_id, topk_ids, rank_bounds, counts, num_unpadded))
        shape = topk_ids.shape
        ids = topk_ids.reshape(-1, shape[-1] if shape[1:] else 1)
        slots = self._choose(Batch(layer_id, ids, rank_bounds, counts, num_unpadded))
        return slots.view(shape if rank_bounds is None else (-1, *shape[1:]))

    def _choose(self, batch: Batch) -> torch.Tensor:
        """In a named range while torch's profiler runs; entering one costs microseconds even where nobody looks."""
        if profiler._is_profiler_enabled:
            with torch.profiler.record_function("equipoise.dispatch"):
                return self._choice.dispatch(batch)
        return self._choice.dispatch(batch)

    def _on_device(self, number: torch.Tensor | int) -> torch.Tensor:
        """A number that the host knows is written by the device itself: a copy to it would wait."""
        if isinstance(number, torch.Tensor) and number.device == self._device:
            return number
        return torch.full((1,), int(number), dtype=torch.int64, device=self._device)

    def advance(self, num_tokens: int) -> None:
        """Ends a step: the next one continues the turns ``num_tokens`` further. Every rank calls it alike."""
        self._choice.advance(num_tokens)

    def refresh(self, layer_ids: Sequence[int]) -> None:
        """Takes over the live maps of these layers, in place.

        Raises:
            PlacementError: an expert has no replica on a live rank.
        """
        if layer_ids:
            self._tables.refresh(layer_ids)
