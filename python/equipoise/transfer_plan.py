"""Plans who sends which expert to whom when a placement changes: pure, frozen, the same on every rank and machine.

For each slot that changes, the first case that applies:

===============  =======================================================================================
UNCHANGED        the slot keeps its expert
COPY             the rank already holds the expert in another slot
RIDE_ALONG       another slot of the rank receives the same expert in this step
SAME_NODE        received from a rank of the same node
OTHER_NODE       received from another node; once per expert and node, the node's other ranks get it from there
===============  =======================================================================================

A plan holds, for each layer that changes, one or more **steps**. A step leads from one complete placement of the
layer to the next and commits on all ranks or on none; within it, every rank sends and receives at most one expert per
**round**. One step is the rule; where a rank may stage fewer experts than it receives, the layer moves in several,
and serves from a complete placement after each.

Worked number: DeepSeek-V3 with 288 slots on 32 ranks of 9. If 250 slots receive an expert new to their rank, a plan of
one step has 250 transfers, about 8 a rank, in 9 to 12 rounds; each rank stages at most 9 experts at a time.
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
import torch

from equipoise.errors import ConfigError, PlacementError
from equipoise.expert_location import ExpertLocationMetadata
from equipoise.topology import EpTopology
from equipoise.transfer_schedule import schedule_layer

Placement = ExpertLocationMetadata | torch.Tensor | npt.ArrayLike


class SlotCase(Enum):
    """How a slot gets its expert; see the module's table."""

    UNCHANGED = "unchanged"
    COPY = "copy"
    RIDE_ALONG = "ride along"
    SAME_NODE = "same node"
    OTHER_NODE = "other node"


class ExpertTransfer(NamedTuple):
    """One expert sent from one rank to another."""

    round: int
    expert: int  # logical id
    source_slot: int  # global; where the expert lies, or for a relay, where this step's commit will put it
    destination_slot: int  # global; first slot of the receiving rank that takes the expert
    relayed: int  # 1: the source receives the expert in an earlier round of this same step


@dataclass(frozen=True, eq=False)
class TransferStep:
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
                cases.append(SlotCase.RIDE_ALONG)
        return cases


@dataclass(frozen=True, eq=False)
class LayerTransferPlan:
    """The steps of one layer, in the order in which they must be committed."""

    layer_id: int
    steps: tuple[TransferStep, ...]

    @property
    def old_map(self) -> np.ndarray:
        """(P,) int32: the placement from which the layer starts."""
        return self.steps[0].old_map

    @property
    def new_map(self) -> np.ndarray:
        """(P,) int32: the placement that holds after the last step."""
        return self.steps[-1].new_map

    @property
    def num_transfers(self) -> int:
        return sum(len(step.transfer_table) for step in self.steps)

    @property
    def num_rounds(self) -> int:
        return sum(step.num_rounds for step in self.steps)


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
            state.update(struct.pack("<2i", layer.layer_id, len(layer.steps)))
            state.update(layer.old_map.astype("<i4", copy=False).tobytes())
            for step in layer.steps:
                state.update(struct.pack("<i", len(step.transfer_table)))
                state.update(step.new_map.astype("<i4", copy=False).tobytes())
                state.update(step.transfer_table.astype("<i4", copy=False).tobytes())
        return state.hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form; :meth:`from_dict` reads it back."""
        return {
            "format": "equipoise.transfer_plan",
            "version": 1,
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
                    "steps": [
                        {"new_map": step.new_map.tolist(), "transfers": step.transfer_table.tolist()}
                        for step in layer.steps
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
            layers = []
            for layer in data["layers"]:
                at, steps = _read_only(layer["old_map"]), []
                for step in layer["steps"]:
                    new_map = _read_only(step["new_map"])
                    steps.append(TransferStep(at, new_map, _read_only(step["transfers"], columns=5)))
                    at = new_map
                layers.append(LayerTransferPlan(int(layer["layer_id"]), tuple(steps)))
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


def plan_transfer(
    old: Placement,
    new: Placement,
    topology: EpTopology,
    *,
    num_logical_experts: int | None = None,
    max_staged_experts: int | None = None,
) -> TransferPlan:
    """Plans the way from one placement to another.

    Args:
        old: the placement of now: metadata, or (L, P) ints.
        new: the placement to reach, of the same shape.
        topology: where slots lie.
        num_logical_experts: ``E``; taken from the metadata, else from the largest id in ``old``.
        max_staged_experts: most experts that a rank may hold in staging, at least 1; layers of which a rank receives
            more move in several steps. None: every layer in one step.

    Raises:
        ConfigError: ``max_staged_experts`` below 1.
        PlacementError: shapes that do not fit, an id outside [0, E), or an expert without a slot in either placement.
    """
    before, after = _as_map(old, "old", topology), _as_map(new, "new", topology)
    if before.shape != after.shape:
        raise PlacementError(f"old has shape {before.shape}, new has {after.shape}", field="new")
    if num_logical_experts is None:
        known = [each.num_logical_experts for each in (old, new) if isinstance(each, ExpertLocationMetadata)]
        num_logical_experts = known[0] if known else int(before.max()) + 1
    _require_complete(before, "old", num_logical_experts)
    _require_complete(after, "new", num_logical_experts)
    if max_staged_experts is not None and max_staged_experts < 1:
        raise ConfigError(f"max_staged_experts must be at least 1, got {max_staged_experts}", field="staging_bytes")
    capacity = min(max_staged_experts or topology.slots_per_rank, topology.slots_per_rank)
    layers = []
    for layer_id in np.flatnonzero((before != after).any(1)).tolist():
        at, steps = before[layer_id], []
        for new_map, table in schedule_layer(at, after[layer_id], num_logical_experts, topology, capacity):
            steps.append(TransferStep(at, new_map, table))
            at = new_map
        layers.append(LayerTransferPlan(layer_id, tuple(steps)))
    return TransferPlan(topology, before.shape[0], num_logical_experts, tuple(layers))


def _as_map(placement: Placement, name: str, topology: EpTopology) -> np.ndarray:
    """(L, P) int32, read-only, sharing no memory with the argument."""
    if isinstance(placement, ExpertLocationMetadata):
        if placement.topology != topology:
            raise PlacementError(f"{name} was made for {placement.topology}, not for {topology}", field=name)
        placement = placement.physical_to_logical_map
    array = placement.detach().cpu().numpy() if isinstance(placement, torch.Tensor) else np.asarray(placement)
    if array.ndim != 2 or array.shape[1] != topology.num_slots:
        raise PlacementError(
            f"{name} must have shape (layers, {topology.num_slots}) for {topology}, got {array.shape}", field=name
        )
    if not np.issubdtype(array.dtype, np.integer):
        raise PlacementError(f"{name} must hold integers, got dtype {array.dtype}", field=name)
    return _read_only(array)


def _require_complete(array: np.ndarray, name: str, num_experts: int) -> None:
    if num_experts < 1:
        raise ConfigError(f"num_logical_experts must be at least 1, got {num_experts}", field="num_logical_experts")
    if array.size and (array.min() < 0 or array.max() >= num_experts):
        raise PlacementError(
            f"{name} holds ids in [{array.min()}, {array.max()}], outside [0, {num_experts})", field=name
        )
    present = np.zeros((array.shape[0], num_experts), dtype=bool)
    np.put_along_axis(present, array, True, axis=1)
    if not present.all():
        layer, expert = (int(i) for i in np.argwhere(~present)[0])
        raise PlacementError(f"{name} has no slot for expert {expert} in layer {layer}", field=name)


def _read_only(values: npt.ArrayLike, columns: int | None = None) -> np.ndarray:
    array = np.array(values, dtype=np.int32, order="C")
    if columns is not None:
        array = array.reshape(-1, columns)
    array.setflags(write=False)
    return array
