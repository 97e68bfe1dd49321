"""ExpertDispatcher: from the logical experts of a batch to the slots that serve them.

``static`` takes the nearest replica, ``dynamic`` lets replicas take turns by planned weight (both in
``replicas.py``), ``batch`` solves the shares on the tokens at hand (``quotas.py`` tells how). Nothing here allocates
what outlives a step, and on a GPU nothing waits for the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from typing import Protocol

import torch

from equipoise.config import EplbConfig
from equipoise.dispatch.batch_cpu import CpuBatchDispatch
from equipoise.dispatch.cost import active_expert_cost
from equipoise.dispatch.policy import DispatchPolicy
from equipoise.dispatch.replicas import (
    cumulative_weights,
    nearest_replicas,
    sample_replicas,
    usable_weights,
    weyl_uniform,
)
from equipoise.dispatch.scopes import GatherCounts, gather_by_sum
from equipoise.dispatch.tables import DispatchTables
from equipoise.distributed.communicator import Communicator
from equipoise.errors import PlacementError
from equipoise.placement.metadata import ExpertLocationMetadata


class BatchDispatch(Protocol):
    """Dispatch by the batch on one kind of device."""

    def dispatch(self, layer_id: int, ids: torch.Tensor, bounds: list[int] | None) -> torch.Tensor:
        """Slots of this rank's part of (N,) ids; with ``bounds``, (G + 1), they are all ranks'."""
        ...

    def advance(self) -> None:
        """Lets the next step round in favour of other replicas."""
        ...


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
        self._metadata = metadata
        self._rank = rank
        device = metadata.physical_to_logical_map.device
        topology = metadata.topology
        live = torch.from_numpy(topology.live_mask(live_ranks))
        self._some_are_lost = not bool(live.all())
        self._live_slots = live.repeat_interleave(topology.slots_per_rank).to(device)
        # Advances on the device, so that a captured CUDA graph does not freeze it.
        self._next_token = torch.zeros((), dtype=torch.int64, device=device)
        self._nearest: torch.Tensor | None = None
        self._cdf: torch.Tensor | None = None
        self._tables: DispatchTables | None = None
        self._batch: BatchDispatch | None = None
        if self.policy.algorithm == "static":
            self._nearest = torch.empty_like(metadata.num_replicas)
        elif self.policy.algorithm == "dynamic":
            self._cdf = torch.empty_like(metadata.dispatch_cdf)
        else:
            self._tables = DispatchTables(metadata, live_ranks=live_ranks)
            if device.type == "cpu":
                self._batch = CpuBatchDispatch(self._tables, self.policy, topology, rank, gather)
            else:
                from equipoise.dispatch.batch_gpu import TritonBatchDispatch  # torch for CPUs comes without Triton

                self._batch = TritonBatchDispatch(self._tables, self.policy, topology, rank, gather)
        if self._tables is None:
            self.refresh(range(metadata.num_layers))

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
    ) -> torch.Tensor:
        """Slots for the chosen experts of this rank's tokens.

        Args:
            layer_id: MoE layer, 0-based.
            topk_ids: (T, K), (T,) or (..., K) logical experts of any integer dtype; -1 for "none".
            rank_bounds: where ``topk_ids`` holds every rank's tokens, (G + 1) bounds of their rows.
            num_unpadded: tokens from this number on are padding; a device scalar is not waited for.

        Returns:
            Slots of this rank's tokens, in the dtype of ``topk_ids`` and its shape but for rows of other ranks; -1 for
            "none" and for padding.
        """
        with _profiler_range():
            ids = topk_ids.unsqueeze(-1) if topk_ids.ndim == 1 else topk_ids.flatten(0, -2)
            if num_unpadded is not None:
                ids = torch.where(torch.arange(len(ids), device=ids.device)[:, None] < num_unpadded, ids, -1)
            bounds = None if rank_bounds is None else list(rank_bounds)
            if self._batch is not None:
                width = ids.shape[1]
                ends = None if bounds is None else [bound * width for bound in bounds]
                slots = self._batch.dispatch(layer_id, ids.flatten(), ends).view(-1, width)
            else:
                mine = ids if bounds is None else ids[bounds[self._rank] : bounds[self._rank + 1]]
                slots = self._without_batch(layer_id, mine)
            return slots.view(topk_ids.shape if bounds is None else (len(slots), *topk_ids.shape[1:]))

    def _without_batch(self, layer_id: int, ids: torch.Tensor) -> torch.Tensor:
        """(T, K) slots, the nearest or in turns."""
        experts = ids.clamp(min=0).long()
        if self._nearest is not None:
            slots = self._nearest[layer_id][experts]
        else:
            assert self._cdf is not None
            number = self._next_token + torch.arange(len(ids), device=ids.device)
            uniform = weyl_uniform(number, ids.shape[1], layer_id=layer_id, rank=self._rank)
            slots = sample_replicas(
                experts, uniform, self._metadata.logical_to_physical_map[layer_id], self._cdf[layer_id]
            )
        return torch.where(ids < 0, ids, slots.to(ids.dtype))

    def advance(self, num_tokens: int) -> None:
        """Ends a step: the next one continues the turns ``num_tokens`` further. Every rank calls it alike."""
        self._next_token += num_tokens
        if self._batch is not None:
            self._batch.advance()

    def refresh(self, layer_ids: Sequence[int]) -> None:
        """Takes over the live maps of these layers, in place.

        Raises:
            PlacementError: an expert has no replica on a live rank.
        """
        if not layer_ids:
            return
        if self._tables is not None:
            self._tables.refresh(layer_ids)
            return
        index = torch.tensor(list(layer_ids), device=self._live_slots.device)
        maps = self._metadata.logical_to_physical_map[index]
        weights = usable_weights(maps, self._metadata.dispatch_weights[index], self._live_slots)
        if self._some_are_lost:  # else no expert can be: every placement has a replica of each; looking would wait
            self._require_live_replicas(weights, layer_ids)
        if self._nearest is not None:
            self._nearest[index] = nearest_replicas(maps, self._metadata.topology, self._rank, weights)
        else:
            assert self._cdf is not None
            self._cdf[index] = cumulative_weights(weights)

    @staticmethod
    def _require_live_replicas(weights: torch.Tensor, layer_ids: Sequence[int]) -> None:
        lost = (weights.sum(-1) == 0).nonzero()
        if len(lost):
            layer, expert = lost[0].tolist()
            raise PlacementError(
                f"expert {expert} of layer {list(layer_ids)[layer]} has no replica on a live rank", field="live_ranks"
            )


def _profiler_range() -> contextlib.AbstractContextManager[object]:
    """A named range while torch's profiler runs; entering one costs microseconds even where nobody looks."""
    if torch.autograd._profiler_enabled():
        return torch.profiler.record_function("equipoise.dispatch")
    return contextlib.nullcontext()
