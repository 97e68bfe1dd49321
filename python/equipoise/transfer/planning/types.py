"""Defines a transfer plan: frozen values, with the digest by which ranks compare them and a JSON form.

For each slot that changes, the first case that applies:

===============  =======================================================================================
UNCHANGED        the slot keeps its expert
COPY             the rank already holds the expert in another slot
FREE_RIDER       another slot of the rank receives the same expert in this batch
SAME_NODE        received from a rank of the same node
OTHER_NODE       received from another node; once per expert and node, the node's other ranks get it from there
===============  =======================================================================================

A plan holds, for each layer that changes, one or more **batches**. A batch leads from one complete placement of the
layer to the next and commits on all ranks or on none; within it, every rank sends and receives at most one expert per
**round**. One batch is the rule; where a rank may stage fewer experts than it receives, the layer moves in several,
and serves from a complete placement after each.

Worked number: DeepSeek-V3 with 288 slots on 32 ranks of 9. If 250 slots receive an expert new to their rank, a plan of
one batch has 250 transfers, about 8 a rank, in 9 to 12 rounds; each rank stages at most 9 experts at a time.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from equipoise.errors import PlacementError
from equipoise.topology import EpTopology


class SlotCase(Enum):
    """How a slot gets its expert; see the module's table."""

    UNCHANGED = "unchanged"
    COPY = "copy"
    FREE_RIDER = "free rider"
    SAME_NODE = "same node"
    OTHER_NODE = "other node"


class ExpertTransfer(NamedTuple):
    """One expert sent from one rank to another."""

    round: int
    expert: int  # logical id
    source_slot: int  # global; where the expert lies, or for a relay, where this batch's commit will put it
    destination_slot: int  # global; first slot of the receiving rank that takes the expert
    relayed: int  # 1: the source receives the expert in an earlier round of this same batch


@dataclass(frozen=True, eq=False)
class TransferBatch:
    """From one complete placement of a layer to the next, in one commit."""

    old_map: np.ndarray  # CPU, int32, (P,), read-only
    new_map: np.ndarray  # CPU, int32, (P,), read-only
    transfer_table: np.ndarray  # CPU, int32, (transfers, 5), read-only; columns of ExpertTransfer, in round order

    @property
    def transfers(self) -> list[ExpertTransfer]:
        return [ExpertTransfer(*row) for row in self.transfer_table.tolist()]

    @property
    def num_rounds(self) -> int:
        return int(self.transfer_table[-1, 0]) + 1 if len(self.transfer_table) else 0

    def slot_cases(self, topology: EpTopology) -> list[SlotCase]:
        """The case of every slot, in slot order."""
        received = {transfer.destination_slot: transfer for transfer in self.transfers}
        cases = []
        for slot, (before, after) in enumerate(zip(self.old_map.tolist(), self.new_map.tolist(), strict=True)):
            slots = topology.slots_of_rank(topology.rank_of_slot(slot))
            if before == after:
                cases.append(SlotCase.UNCHANGED)
            elif slot in received:
                source = topology.node_of_slot(received[slot].source_slot)
                same = source == topology.node_of_slot(slot)
                cases.append(SlotCase.SAME_NODE if same else SlotCase.OTHER_NODE)
            elif after in self.old_map[slots.start : slots.stop]:
                cases.append(SlotCase.COPY)
            else:
                cases.append(SlotCase.FREE_RIDER)
        return cases


@dataclass(frozen=True, eq=False)
class LayerTransferPlan:
    """The batches of one layer, in the order in which they must be committed."""

    layer_id: int
    batches: tuple[TransferBatch, ...]

    @property
    def old_map(self) -> np.ndarray:
        """(P,) int32: the placement from which the layer starts."""
        return self.batches[0].old_map

    @property
    def new_map(self) -> np.ndarray:
        """(P,) int32: the placement that holds after the last batch."""
        return self.batches[-1].new_map

    @property
    def num_transfers(self) -> int:
        return sum(len(batch.transfer_table) for batch in self.batches)

    @property
    def num_rounds(self) -> int:
        return sum(batch.num_rounds for batch in self.batches)


@dataclass(frozen=True, eq=False)
class TransferPlan:
    """Everything that moves when one placement replaces another. Layers that do not change are not in it."""

    topology: EpTopology
    num_layers: int
    num_logical_experts: int
    layers: tuple[LayerTransferPlan, ...]  # ascending layer_id

    @property
    def num_transfers(self) -> int:
        return sum(layer.num_transfers for layer in self.layers)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the plan's canonical form (little-endian int32): equal digests mean equal plans."""
        topology = self.topology
        header = (topology.num_ranks, topology.num_nodes, topology.slots_per_rank)
        state = hashlib.sha256(struct.pack("<6i", *header, self.num_layers, self.num_logical_experts, len(self.layers)))
        for layer in self.layers:
            state.update(struct.pack("<2i", layer.layer_id, len(layer.batches)))
            state.update(layer.old_map.astype("<i4", copy=False).tobytes())
            for batch in layer.batches:
                state.update(struct.pack("<i", len(batch.transfer_table)))
                state.update(batch.new_map.astype("<i4", copy=False).tobytes())
                state.update(batch.transfer_table.astype("<i4", copy=False).tobytes())
        return state.hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form; :meth:`from_dict` reads it back."""
        return {
            "format": "equipoise.transfer_plan",
            "version": 2,
            "topology": {
                "num_ranks": self.topology.num_ranks,
                "num_nodes": self.topology.num_nodes,
                "slots_per_rank": self.topology.slots_per_rank,
            },
            "num_layers": self.num_layers,
            "num_logical_experts": self.num_logical_experts,
            "layers": [
                {
                    "layer_id": layer.layer_id,
                    "old_map": layer.old_map.tolist(),
                    "batches": [
                        {"new_map": batch.new_map.tolist(), "transfers": batch.transfer_table.tolist()}
                        for batch in layer.batches
                    ],
                }
                for layer in self.layers
            ],
            "digest": self.digest,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TransferPlan:
        """Reads :meth:`to_dict`'s form.

        Raises:
            PlacementError: it is not a plan, or its content does not match the digest it carries.
        """
        try:
            if data["version"] != 2:
                raise ValueError(f"version {data['version']!r} of the format, this reads 2")
            layers = []
            for layer in data["layers"]:
                at, batches = read_only_int32(layer["old_map"]), []
                for batch in layer["batches"]:
                    new_map = read_only_int32(batch["new_map"])
                    batches.append(TransferBatch(at, new_map, read_only_int32(batch["transfers"], columns=5)))
                    at = new_map
                layers.append(LayerTransferPlan(int(layer["layer_id"]), tuple(batches)))
            topology = EpTopology(**data["topology"])
            plan = cls(topology, int(data["num_layers"]), int(data["num_logical_experts"]), tuple(layers))
            digest = data["digest"]
        except (KeyError, TypeError, ValueError) as error:
            raise PlacementError(f"not a transfer plan: {type(error).__name__}: {error}", field="plan") from None
        if plan.digest != digest:
            raise PlacementError(
                f"transfer plan is damaged: its content has digest {plan.digest}, it says {digest}", field="digest"
            )
        return plan


def read_only_int32(values: npt.ArrayLike, columns: int | None = None) -> np.ndarray:
    """A copy of ``values`` as a plan holds arrays: int32, read-only; of shape (rows, columns) if that is given."""
    array = np.array(values, dtype=np.int32, order="C")
    if columns is not None:
        array = array.reshape(-1, columns)
    array.setflags(write=False)
    return array
