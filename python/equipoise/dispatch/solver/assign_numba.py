"""Counts, solves and assigns a batch of a layer on a CPU: numba, bit for bit as ``quotas.py`` and ``assign.py``."""

from __future__ import annotations

import numpy as np

from equipoise.dispatch.solver.controls import ROTATION
from equipoise.dispatch.solver.solve_numba import rounding_phase, solve_layer
from equipoise.dispatch.solver.table_builder import NUM_ROWS, NumpyTables, TableArrays
from equipoise.jit.compile import helper, int32_table, int32_zeros, int_zeros, kernel

_ALL = (1 << 32) - 1


@kernel
def dispatch_batch(
    layer: int,
    ids: np.ndarray,
    first: int,
    last: int,
    gathered: np.ndarray,
    own_row: int,
    controls: np.ndarray,
    recorded: np.ndarray,
    slots: np.ndarray,
    expert: np.ndarray,
    num_choices: np.ndarray,
    slot: np.ndarray,
    rank: np.ndarray,
    weight: np.ndarray,
    colour: np.ndarray,
    step: np.ndarray,
    row_of_expert: np.ndarray,
    slot_of_expert: np.ndarray,
    rank_of_single: np.ndarray,
    choices_of_rank: np.ndarray,
    singles_of_rank: np.ndarray,
    sizes: np.ndarray,
) -> None:
    """Slots for ``ids[first:last]``.

    Args:
        ids: (T, K) logical experts of this rank's tokens, or of its whole scope's by rank; outside [0, E): none.
        first, last: this rank's rows of ``ids``.
        gathered: (ranks of the scope, E) int32 counts by rank; without rows, ``ids`` are the scope's.
        own_row: this rank's row of ``gathered``.
        recorded: (L, P + 1) int32, to which the slots are added, "none" in the last column; (0, 0): nobody counts.
        slots: (last - first, K) of the dtype of ``ids``, filled; -1 for none.
        expert and all that follow: the fields of ``TableArrays``, one by one, since to tell the types of a tuple of
            arrays takes numba as long as solving a small batch.
    """
    tables = TableArrays(
        expert, num_choices, slot, rank, weight, colour, step, row_of_expert, slot_of_expert, rank_of_single,
        choices_of_rank, singles_of_rank, sizes,
    )  # fmt: skip
    num_experts = tables.row_of_expert.shape[1]
    counts, before = int32_zeros(num_experts), int_zeros(num_experts)
    _count(ids, first, gathered, own_row, counts, before)
    quotas = int32_table(tables.slot.shape[1], tables.slot.shape[2], 0)
    solve_layer(layer, counts, tables, controls, quotas)
    _assign(layer, ids, first, last, counts, before, tables, controls[ROTATION], quotas, slots)
    none = recorded.shape[1] - 1
    if none >= 0:
        for t in range(slots.shape[0]):
            for k in range(slots.shape[1]):
                recorded[layer, slots[t, k] if slots[t, k] >= 0 else none] += 1


@kernel
def solve_counts(
    layer: int,
    counts: np.ndarray,
    tables: NumpyTables,
    controls: np.ndarray,
    loads: np.ndarray,
    reads: np.ndarray,
) -> None:
    """Adds to ``loads`` (G,) the tokens of each rank, sets in ``reads`` (P,) the slots that get any, for ``counts``."""
    quotas = int32_table(tables.slot.shape[1], tables.slot.shape[2], 0)
    solve_layer(layer, counts, tables, controls, quotas)
    for e in range(counts.shape[0]):
        rank = tables.rank_of_single[layer, e]
        if rank >= 0 and counts[e] > 0:
            loads[rank] += counts[e]
            reads[tables.slot_of_expert[layer, e]] = 1
    for m in range(tables.sizes[layer, NUM_ROWS]):
        for j in range(tables.num_choices[layer, m]):
            if quotas[m, j] > 0:
                loads[tables.rank[layer, m, j]] += quotas[m, j]
                reads[tables.slot[layer, m, j]] = 1


@helper
def _count(
    ids: np.ndarray, first: int, gathered: np.ndarray, own_row: int, counts: np.ndarray, before: np.ndarray
) -> None:
    """Adds to ``counts`` (E,) the tokens of the scope, to ``before`` (E,) those of the ranks before this one."""
    num_experts = counts.shape[0]
    if gathered.shape[0] == 0:
        for t in range(ids.shape[0]):
            for k in range(ids.shape[1]):
                if 0 <= ids[t, k] < num_experts:
                    counts[ids[t, k]] += 1
                    before[ids[t, k]] += t < first
    for row in range(gathered.shape[0]):
        for e in range(num_experts):
            counts[e] += gathered[row, e]
            before[e] += gathered[row, e] if row < own_row else 0


@helper
def _assign(
    layer: int,
    ids: np.ndarray,
    first: int,
    last: int,
    counts: np.ndarray,
    before: np.ndarray,
    tables: NumpyTables,
    rotation: int,
    quotas: np.ndarray,
    slots: np.ndarray,
) -> None:
    """The n-th token of an expert goes where the running quotas say; ``before`` counts on from the ranks before."""
    num_experts = counts.shape[0]
    rows, width = tables.sizes[layer, NUM_ROWS], quotas.shape[1]
    inverse = np.empty((rows, width), dtype=np.int64)
    for m in range(rows):
        e = tables.expert[layer, m]
        left = int(counts[e])
        for j in range(width):
            quota = int(quotas[m, j])
            inverse[m, j] = _ALL if quota == left and quota > 0 else (((quota << 32) + left - 1) // max(left, 1))
            left -= quota
        before[e] += (int(counts[e]) * rounding_phase(m, rotation)) >> 16
    for t in range(first, last):
        for k in range(ids.shape[1]):
            e = ids[t, k]
            if e < 0 or e >= num_experts:
                slots[t - first, k] = -1
                continue
            m = tables.row_of_expert[layer, e]
            if m < 0:
                slots[t - first, k] = tables.slot_of_expert[layer, e]
                continue
            n = before[e]
            before[e] += 1
            if n >= counts[e]:
                n -= counts[e]
            j = 0
            while True:
                taken = (n * inverse[m, j]) >> 32
                if inverse[m, j] == _ALL or ((n + 1) * inverse[m, j]) >> 32 > taken:
                    break
                n -= taken
                j += 1
            slots[t - first, k] = tables.slot[layer, m, j]
