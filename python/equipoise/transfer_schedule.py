"""Puts the planner's kernels together: the steps of a layer, the sources of each step, its rounds."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from equipoise.jit import int32_empty_table, int32_zeros, kernel, number
from equipoise.topology import EpTopology
from equipoise.transfer_rounds import assign_rounds
from equipoise.transfer_sources import DESTINATION_RANK, EXPERT, RELAYED, SOURCE_RANK, assign_sources, first_slots
from equipoise.transfer_steps import split_into_steps


def schedule_layer(
    old: np.ndarray, new: np.ndarray, num_experts: int, topology: EpTopology, capacity: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The steps of one layer, in order.

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
        table = _transfer_table(jobs, assign_rounds(jobs, num_ranks), before, after)
        table.setflags(write=False)
        yield row, table
        now, before = row, after


@kernel
def _transfer_table(jobs: np.ndarray, rounds: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """(jobs, 5) int32: round, expert, source slot, destination slot, relayed; by round, within it in job order.

    Args:
        jobs: from :func:`assign_sources`.
        rounds: (jobs,) int32.
        before: (E, G) int32 first slots of the map before.
        after: the same of the map after.
    """
    num_jobs = jobs.shape[0]
    num_rounds = 0
    for job in range(num_jobs):
        num_rounds = max(num_rounds, rounds[job] + 1)
    at = int32_zeros(num_rounds + 1)
    for job in range(num_jobs):
        at[rounds[job] + 1] += 1
    for i in range(num_rounds):
        at[i + 1] += at[i]
    table = int32_empty_table(num_jobs, number(5))
    for job in range(num_jobs):
        row = at[rounds[job]]
        at[rounds[job]] += 1
        expert, source = jobs[job, EXPERT], jobs[job, SOURCE_RANK]
        table[row, 0] = rounds[job]
        table[row, 1] = expert
        table[row, 2] = after[expert, source] if jobs[job, RELAYED] else before[expert, source]
        table[row, 3] = after[expert, jobs[job, DESTINATION_RANK]]
        table[row, 4] = jobs[job, RELAYED]
    return table
