"""Puts the planner's kernels together: the steps of a layer, the sources of each step, its rounds."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from equipoise.topology import EpTopology
from equipoise.transfer_rounds import assign_rounds
from equipoise.transfer_sources import assign_sources, first_slots, transfer_table
from equipoise.transfer_steps import split_into_steps


def schedule_layer(
    old: np.ndarray, new: np.ndarray, num_experts: int, topology: EpTopology, capacity: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The steps of one layer, in order.

    The kernels are compiled one by one and called from here, not from one another across files: numba's cache does
    not notice when a function of another file has changed.

    Args:
        old: (P,) int32, each expert in at least one slot.
        new: (P,) int32, likewise.
        num_experts: ``E``.
        topology: where slots lie.
        capacity: most experts that a rank may receive in a step.

    Yields:
        The placement after the step, (P,) int32, and its transfers, (transfers, 5) int32 in round order with the
        columns of :class:`~equipoise.transfer_plan.ExpertTransfer`; both read-only.
    """
    num_ranks, ranks_per_node = topology.num_ranks, topology.ranks_per_node
    if capacity >= topology.slots_per_rank:
        maps = new[None]
    else:
        maps = split_into_steps(old, new, num_experts, num_ranks, ranks_per_node, capacity)
    maps.setflags(write=False)  # before the kernels see it: numba compiles read-only arrays apart
    now, before = old, first_slots(old, num_experts, num_ranks)
    for row in maps:
        after = first_slots(row, num_experts, num_ranks)
        jobs = assign_sources(now, row, before, after, ranks_per_node)
        table = transfer_table(jobs, assign_rounds(jobs, num_ranks), before, after)
        table.setflags(write=False)
        yield row, table
        now, before = row, after
