"""Plans who sends which expert to whom when a placement changes: pure, the same on every rank and machine.

:mod:`~equipoise.transfer_types` says what a plan holds, :mod:`~equipoise.transfer_schedule` finds the transfers of one
layer. Here both placements are checked, and the layers that differ are planned one by one.
"""

from __future__ import annotations

import numpy as np

from equipoise.errors import ConfigError, PlacementError
from equipoise.expert_location import ExpertLocationMetadata
from equipoise.expert_maps import IntMap, as_slot_map
from equipoise.topology import EpTopology
from equipoise.transfer_schedule import schedule_layer
from equipoise.transfer_types import (
    ExpertTransfer,
    LayerTransferPlan,
    SlotCase,
    TransferPlan,
    TransferStep,
    read_only_int32,
)

__all__ = ["ExpertTransfer", "LayerTransferPlan", "SlotCase", "TransferPlan", "TransferStep", "plan_transfer"]

Placement = ExpertLocationMetadata | IntMap


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
        ConfigError: ``max_staged_experts`` or ``num_logical_experts`` below 1.
        PlacementError: shapes that do not fit, an id outside [0, E), or an expert without a slot in either placement.
    """
    before, after = _slot_map(old, "old", topology), _slot_map(new, "new", topology)
    if before.shape != after.shape:
        raise PlacementError(f"old has shape {before.shape}, new has {after.shape}", field="new")
    if num_logical_experts is None:
        known = [each.num_logical_experts for each in (old, new) if isinstance(each, ExpertLocationMetadata)]
        num_logical_experts = known[0] if known else int(before.max()) + 1
    _require_complete(before, "old", num_logical_experts)
    _require_complete(after, "new", num_logical_experts)
    before, after = read_only_int32(before), read_only_int32(after)
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


def _slot_map(placement: Placement, name: str, topology: EpTopology) -> np.ndarray:
    """(L, P) integers, which may share memory with the argument; metadata must be of this topology."""
    if isinstance(placement, ExpertLocationMetadata):
        if placement.topology != topology:
            raise PlacementError(f"{name} was made for {placement.topology}, not for {topology}", field=name)
        placement = placement.physical_to_logical_map
    return as_slot_map(placement, name, topology)


def _require_complete(array: np.ndarray, name: str, num_experts: int) -> None:
    if num_experts < 1:
        raise ConfigError(f"num_logical_experts must be at least 1, got {num_experts}", field="num_logical_experts")
    if array.min() < 0 or array.max() >= num_experts:
        raise PlacementError(
            f"{name} holds ids in [{array.min()}, {array.max()}], outside [0, {num_experts})", field=name
        )
    if num_experts > array.shape[1]:
        raise PlacementError(f"{name} has {array.shape[1]} slots for {num_experts} logical experts", field=name)
    present = np.zeros((array.shape[0], num_experts), dtype=bool)
    np.put_along_axis(present, array, True, axis=1)
    if not present.all():
        layer, expert = (int(i) for i in np.argwhere(~present)[0])
        raise PlacementError(f"{name} has no slot for expert {expert} in layer {layer}", field=name)
