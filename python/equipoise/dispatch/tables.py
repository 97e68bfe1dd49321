"""DispatchTables: what dispatch by the batch looks up, in buffers that keep their address while placements change.

Worked number: 256 experts in 288 slots on 32 ranks. 32 redundant slots make at most 32 experts replicated, so the
tables have ``M = 32`` rows; a row has up to ``C`` choices. All sizes are fixed by the topology and the largest number
of replicas, so that a kernel captured in a CUDA graph fits every placement to come.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

import numpy as np
import torch

from equipoise.dispatch.solver.table_builder import NUM_SIZES, TableArrays, build_layers
from equipoise.errors import PlacementError
from equipoise.placement.metadata import ExpertLocationMetadata

MAX_CHOICES = 16
"""Ranks over which the tokens of one expert are split at most; where it has more replicas, those with the largest
planned weights are used."""

logger = logging.getLogger("equipoise.dispatch")


class DispatchTables:
    """Tables of all layers, on the host and on the device of the maps.

    Args:
        metadata: the live placement.
        live_ranks: ranks that take tokens; all if None.
        max_choices: see :data:`MAX_CHOICES`.

    Attributes:
        host: numpy arrays, what CPU kernels read.
        device: the same as int32 tensors on the maps' device; on the CPU they share the host's memory.

    Raises:
        PlacementError: an expert has no replica on a live rank; the message names layer and expert.
    """

    def __init__(
        self,
        metadata: ExpertLocationMetadata,
        *,
        live_ranks: Collection[int] | None = None,
        max_choices: int = MAX_CHOICES,
    ) -> None:
        topology = metadata.topology
        self._metadata = metadata
        self._live = topology.live_mask(live_ranks)
        self.num_ranks = topology.num_ranks
        self.num_experts = metadata.num_logical_experts
        self.host = _empty_tables(metadata, min(max_choices, metadata.max_replicas, topology.num_ranks))
        on_cpu = metadata.physical_to_logical_map.device.type == "cpu"
        self._mirrors = [torch.from_numpy(array) for array in self.host]
        self.device: TableArrays[torch.Tensor] = TableArrays(
            *(
                mirror if on_cpu else torch.empty_like(mirror, device=metadata.physical_to_logical_map.device)
                for mirror in self._mirrors
            )
        )
        self.refresh(range(metadata.num_layers))

    @property
    def num_layers(self) -> int:
        return int(self.host.expert.shape[0])

    def layer(self, layer_id: int) -> TableArrays[torch.Tensor]:
        """The tables of one layer on the device, without the leading dimension; views."""
        return TableArrays(*(tensor[layer_id] for tensor in self.device))

    def refresh(self, layer_ids: Sequence[int]) -> None:
        """Takes over the live maps of these layers, in place.

        Raises:
            PlacementError: an expert has no replica on a live rank; the tables of that layer are then not usable.
        """
        layers = np.array(layer_ids, dtype=np.int64)
        if not layers.size:
            return
        index = torch.from_numpy(layers).to(self._metadata.physical_to_logical_map.device)
        layer, expert, cut = build_layers(
            layers,
            self._metadata.physical_to_logical_map[index].cpu().numpy(),
            self._metadata.dispatch_weights[index].cpu().numpy(),
            self._live,
            self.host,
        )
        if layer >= 0:
            gone = np.flatnonzero(~self._live).tolist()
            raise PlacementError(
                f"expert {expert} of layer {layer} has no replica left: all its slots are on ranks {gone}, "
                "which take no tokens",
                field="live_ranks",
            )
        if cut:
            logger.warning(
                "%d experts have more replicas than dispatch splits tokens over (%d); those with the smallest planned "
                "weights get none",
                cut,
                self.host.slot.shape[2],
            )
        for mirror, tensor in zip(self._mirrors, self.device, strict=True):
            if tensor.data_ptr() != mirror.data_ptr():
                tensor[index] = mirror[torch.from_numpy(layers)].to(tensor.device)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number`` and 1."""
    return 1 << max(number - 1, 0).bit_length()


def _empty_tables(metadata: ExpertLocationMetadata, num_choices: int) -> TableArrays[np.ndarray]:
    topology = metadata.topology
    num_layers, num_experts, num_ranks = metadata.num_layers, metadata.num_logical_experts, topology.num_ranks
    # Each expert with a second replica takes one of the redundant slots.
    rows = power_of_two(min(num_experts, metadata.num_redundant_experts))
    choices = power_of_two(max(num_choices, 2))
    per_rank = power_of_two(topology.slots_per_rank)

    def table(*shape: int) -> np.ndarray:
        return np.full((num_layers, *shape), -1, dtype=np.int32)

    return TableArrays(
        expert=table(rows),
        num_choices=table(rows),
        slot=table(rows, choices),
        rank=table(rows, choices),
        weight=table(rows, choices),
        colour=table(rows),
        step=table(rows),
        row_of_expert=table(num_experts),
        slot_of_expert=table(num_experts),
        rank_of_single=table(num_experts),
        choices_of_rank=table(per_rank, power_of_two(num_ranks)),
        singles_of_rank=table(per_rank, power_of_two(num_ranks)),
        sizes=table(NUM_SIZES),
    )
