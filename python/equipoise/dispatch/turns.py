"""Dispatch that does not look at the batch, ``static`` and ``dynamic``: what it looks up, and its choice on a CPU."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from equipoise.dispatch.choice import Batch, HostCounts
from equipoise.dispatch.replicas import cumulative_weights, nearest_replicas, usable_weights
from equipoise.dispatch.turns_numba import take_nearest, take_turns
from equipoise.errors import PlacementError
from equipoise.placement.metadata import ExpertLocationMetadata


class TurnsTables:
    """What ``static`` or ``dynamic`` looks up, in buffers that keep their address.

    Args:
        metadata: the live placement.
        rank: this rank.
        nearest: the nearest replica, else turns by planned weight.
        live_ranks: ranks that take tokens; all if None.

    Raises:
        PlacementError: an expert has no replica on a live rank.
    """

    def __init__(
        self, metadata: ExpertLocationMetadata, rank: int, *, nearest: bool, live_ranks: Collection[int] | None
    ) -> None:
        topology = metadata.topology
        self.metadata = metadata
        self.rank = rank
        live = torch.from_numpy(topology.live_mask(live_ranks))
        self._some_are_lost = not bool(live.all())
        self._live_slots = live.repeat_interleave(topology.slots_per_rank).to(metadata.physical_to_logical_map.device)
        self.nearest = torch.empty_like(metadata.num_replicas) if nearest else None
        # With all ranks live the planned shares are what dispatch wants: read where a commit writes them.
        self.cdf = torch.empty_like(metadata.dispatch_cdf) if self._some_are_lost else metadata.dispatch_cdf
        self.refresh(range(metadata.num_layers))

    def refresh(self, layer_ids: Sequence[int]) -> None:
        """Takes over the live maps of these layers, in place.

        Raises:
            PlacementError: an expert has no replica on a live rank.
        """
        if self.nearest is None and not self._some_are_lost:
            return
        index = _index_on(self._live_slots.device, layer_ids)
        maps = self.metadata.logical_to_physical_map[index]
        weights = usable_weights(maps, self.metadata.dispatch_weights[index], self._live_slots)
        if self._some_are_lost:  # else no expert can be: every placement has a replica of each; looking would wait
            _require_live_replicas(weights, layer_ids)
        if self.nearest is not None:
            self.nearest[index] = nearest_replicas(maps, self.metadata.topology, self.rank, weights)
        else:
            self.cdf[index] = cumulative_weights(weights)


class CpuTurns:
    """Chooses and counts with numba."""

    def __init__(self, tables: TurnsTables) -> None:
        self._tables = tables
        _, self._num_experts, self._num_replicas = tables.cdf.shape
        # Kernels find the tables, which keep their place while they change; held here, so that the place stays theirs.
        self._slots_of, self._cdf, self._nearest = tables.metadata.logical_to_physical_map, tables.cdf, tables.nearest
        self._address_of_slots = _address(self._slots_of, torch.int64)
        self._address_of_cdf = _address(self._cdf, torch.float32)
        self._address_of_nearest = 0 if self._nearest is None else _address(self._nearest, torch.int64)
        self._next_token = 0
        self._host_counts = HostCounts((tables.metadata.num_layers, tables.metadata.num_physical_experts + 1))

    def dispatch(self, batch: Batch) -> torch.Tensor:
        """See ``choice.Choice``."""
        rank, ids = self._tables.rank, batch.int64_rows()
        mine, width = batch.rows(rank, rank + 1), ids.shape[1]
        slots = torch.empty((mine.stop - mine.start, width), dtype=torch.int64)
        recorded, num_columns = self._host_counts.place(batch.counts)
        if self._nearest is not None:
            take_nearest(
                batch.layer_id,
                ids.data_ptr(),
                mine.start,
                mine.stop,
                width,
                self._address_of_nearest,
                self._num_experts,
                recorded,
                num_columns,
                slots.data_ptr(),
            )
        else:
            take_turns(
                batch.layer_id,
                ids.data_ptr(),
                mine.start,
                mine.stop,
                width,
                self._next_token,
                rank,
                self._address_of_slots,
                self._address_of_cdf,
                self._num_experts,
                self._num_replicas,
                recorded,
                num_columns,
                slots.data_ptr(),
            )
        return batch.in_dtype_of_ids(slots)

    def advance(self, num_tokens: int) -> None:
        """Ends a step of so many tokens."""
        self._next_token += num_tokens


def _address(table: torch.Tensor, dtype: torch.dtype) -> int:
    assert table.dtype == dtype
    assert table.is_contiguous()
    return table.data_ptr()


def _index_on(device: torch.device, layer_ids: Sequence[int]) -> torch.Tensor:
    """The layers as an index there; from pinned memory, since a copy from other memory waits for the stream."""
    index = torch.tensor(list(layer_ids), dtype=torch.int64, pin_memory=device.type == "cuda")
    return index.to(device, non_blocking=True)


def _require_live_replicas(weights: torch.Tensor, layer_ids: Sequence[int]) -> None:
    lost = (weights.sum(-1) == 0).nonzero()
    if len(lost):
        layer, expert = lost[0].tolist()
        raise PlacementError(
            f"expert {expert} of layer {list(layer_ids)[layer]} has no replica on a live rank", field="live_ranks"
        )
