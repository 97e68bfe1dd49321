"""Plans who sends which expert to whom when a placement changes: pure, the same on every rank and machine.

:mod:`~equipoise.transfer.planning.types` says what a plan holds. Here both placements are checked, the layers that
differ are planned one by one, and the kernels are put together: batches of a layer, sources of each batch, its rounds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np

from equipoise.errors import ConfigError, PlacementError
from equipoise.jit.compile import int32_empty_table, int32_zeros, kernel, number
from equipoise.placement.maps import IntMap, as_slot_map
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology
from equipoise.transfer.planning.batches import split_into_batches
from equipoise.transfer.planning.rounds import assign_rounds
from equipoise.transfer.planning.senders import DESTINATION_RANK, EXPERT, RELAYED, SOURCE_RANK
from equipoise.transfer.planning.sources import assign_sources, first_slots
from equipoise.transfer.planning.types import (
    ExpertTransfer,
    LayerTransferPlan,
    SlotCase,
    TransferBatch,
    TransferPlan,
    read_only_int32,
)

__all__ = ["ExpertTransfer", "LayerTransferPlan", "SlotCase", "TransferBatch", "TransferPlan", "plan_transfer"]

PlacementLike = ExpertLocationMetadata | IntMap


def plan_transfer(
    old: PlacementLike,
    new: PlacementLike,
    topology: EpTopology,
    *,
    num_logical_experts: int | None = None,
    max_staged_experts: int | None = None,
    live_ranks: Collection[int] | None = None,
) -> TransferPlan:
    """Plans the way from one placement to another.

    Args:
        old: the placement of now: metadata, or (L, P) ints.
        new: the placement to reach, of the same shape.
        topology: where slots lie.
        num_logical_experts: ``E``; taken from the metadata, else from the largest id in ``old``.
        max_staged_experts: most experts that a rank may hold in staging, at least 1; layers of which a rank receives
            more move in several batches. None: every layer in one batch.
        live_ranks: ranks that take part; the others neither send nor receive, whatever the maps say of their slots.
            None: all.

    Raises:
        ConfigError: ``max_staged_experts`` or ``num_logical_experts`` below 1, a live rank outside [0, G), or none.
        PlacementError: shapes that do not fit, an id outside [0, E), or an expert without a slot in either placement,
            on a live rank if that was given: such an expert has to be loaded anew by the host.
    """
    before, after = _slot_map(old, "old", topology), _slot_map(new, "new", topology)
    if before.shape != after.shape:
        raise PlacementError(f"old has shape {before.shape}, new has {after.shape}", field="new")
    if num_logical_experts is None:
        known = [each.num_logical_experts for each in (old, new) if isinstance(each, ExpertLocationMetadata)]
        num_logical_experts = known[0] if known else int(before.max()) + 1
    alive = read_only_int32(topology.live_mask(live_ranks))
    _require_complete(before, "old", num_logical_experts, alive)
    _require_complete(after, "new", num_logical_experts, alive)
    before, after = read_only_int32(before), read_only_int32(after)
    if max_staged_experts is not None and max_staged_experts < 1:
        raise ConfigError(f"max_staged_experts must be at least 1, got {max_staged_experts}", field="staging_bytes")
    capacity = min(max_staged_experts or topology.slots_per_rank, topology.slots_per_rank)
    layers = []
    for layer_id in np.flatnonzero((before != after).any(1)).tolist():
        at, batches = before[layer_id], []
        for new_map, table in schedule_layer(at, after[layer_id], num_logical_experts, topology, capacity, alive):
            batches.append(TransferBatch(at, new_map, table))
            at = new_map
        layers.append(LayerTransferPlan(layer_id, tuple(batches)))
    return TransferPlan(topology, before.shape[0], num_logical_experts, tuple(layers))


def _slot_map(placement: PlacementLike, name: str, topology: EpTopology) -> np.ndarray:
    """(L, P) integers, which may share memory with the argument; metadata must be of this topology."""
    if isinstance(placement, ExpertLocationMetadata):
        if placement.topology != topology:
            raise PlacementError(f"{name} was made for {placement.topology}, not for {topology}", field=name)
        placement = placement.physical_to_logical_map
    return as_slot_map(placement, name, topology)


def _require_complete(array: np.ndarray, name: str, num_experts: int, alive: np.ndarray) -> None:
    if num_experts < 1:
        raise ConfigError(f"num_logical_experts must be at least 1, got {num_experts}", field="num_logical_experts")
    if array.min() < 0 or array.max() >= num_experts:
        raise PlacementError(
            f"{name} holds ids in [{array.min()}, {array.max()}], outside [0, {num_experts})", field=name
        )
    if num_experts > array.shape[1]:
        raise PlacementError(f"{name} has {array.shape[1]} slots for {num_experts} logical experts", field=name)
    in_use = array[:, np.repeat(alive, array.shape[1] // alive.size).astype(bool)]
    present = np.zeros((array.shape[0], num_experts), dtype=bool)
    np.put_along_axis(present, in_use, True, axis=1)
    if not present.all():
        layer, expert = (int(i) for i in np.argwhere(~present)[0])
        dead = np.flatnonzero(alive == 0).tolist()
        where = f" on a live rank (ranks {dead} are dead)" if dead else ""
        raise PlacementError(f"{name} has no slot for expert {expert} in layer {layer}{where}", field=name)


def schedule_layer(
    old: np.ndarray, new: np.ndarray, num_experts: int, topology: EpTopology, capacity: int, alive: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The batches of one layer, in order.

    Args:
        old: (P,) int32, each expert in at least one slot.
        new: (P,) int32, likewise.
        num_experts: ``E``.
        topology: where slots lie.
        capacity: most experts that a rank may receive in a batch.
        alive: (G,) int32, 1 for ranks that take part.

    Yields:
        The placement after the batch, (P,) int32, and its transfers, (transfers, 5) int32 in round order with the
        columns of :class:`~equipoise.transfer.planning.plan.ExpertTransfer`; both read-only.
    """
    num_ranks, ranks_per_node = topology.num_ranks, topology.ranks_per_node
    if capacity >= topology.slots_per_rank:
        maps = new[None]
    else:
        maps = split_into_batches(old, new, num_experts, num_ranks, ranks_per_node, capacity, alive)
    maps.setflags(write=False)  # before the kernels see it: numba compiles read-only arrays apart
    dead = np.flatnonzero(alive == 0)
    now, before = old, first_slots(old, num_experts, num_ranks)
    before[:, dead] = -1  # what a dead rank holds is no source, and what it wants no destination
    for slot_map in maps:
        after = first_slots(slot_map, num_experts, num_ranks)
        after[:, dead] = -1
        transfers = assign_sources(now, slot_map, before, after, ranks_per_node)
        table = _transfer_table(transfers, assign_rounds(transfers, num_ranks), before, after)
        table.setflags(write=False)
        yield slot_map, table
        now, before = slot_map, after


@kernel
def _transfer_table(transfers: np.ndarray, rounds: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Writes the table of a batch: round, expert, source slot, destination slot, relayed; by round, then as given.

    Args:
        transfers: from :func:`assign_sources`.
        rounds: (transfers,) int32.
        before: (E, G) int32 first slots of the map before.
        after: the same of the map after.
    """
    num_transfers = transfers.shape[0]
    num_rounds = 0
    for transfer in range(num_transfers):
        num_rounds = max(num_rounds, rounds[transfer] + 1)
    at = int32_zeros(num_rounds + 1)
    for transfer in range(num_transfers):
        at[rounds[transfer] + 1] += 1
    for i in range(num_rounds):
        at[i + 1] += at[i]
    table = int32_empty_table(num_transfers, number(5))
    for transfer in range(num_transfers):
        line = at[rounds[transfer]]
        at[rounds[transfer]] += 1
        expert, source = transfers[transfer, EXPERT], transfers[transfer, SOURCE_RANK]
        table[line, 0] = rounds[transfer]
        table[line, 1] = expert
        table[line, 2] = after[expert, source] if transfers[transfer, RELAYED] else before[expert, source]
        table[line, 3] = after[expert, transfers[transfer, DESTINATION_RANK]]
        table[line, 4] = transfers[transfer, RELAYED]
    return table
