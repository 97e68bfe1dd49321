"""Counts, solves and assigns a batch of a layer on a CPU: numba, bit for bit as ``quotas.py`` and ``assign.py``."""

from __future__ import annotations

import numpy as np

from equipoise.dispatch.solver.controls import ROTATION
from equipoise.dispatch.solver.count_numba import add_gathered, count_rows, count_slots_of
from equipoise.dispatch.solver.solve_numba import rounding_phase, solve_layer
from equipoise.dispatch.solver.table_addresses import controls_at, tables_at
from equipoise.dispatch.solver.table_builder import NUM_ROWS, NumpyTables
from equipoise.jit.addresses import int32_at, int64_at
from equipoise.jit.compile import helper, int32_table, int32_zeros, int_zeros, kernel

_ALL = (1 << 32) - 1


@kernel
def dispatch_batch(
    layer: int,
    ids: int,
    scope_first: int,
    scope_last: int,
    first: int,
    last: int,
    width: int,
    gathered: int,
    num_gathered: int,
    own_row: int,
    recorded: int,
    num_columns: int,
    slots: int,
    tables: np.ndarray,
) -> None:
    """Slots for rows ``first`` to ``last`` of the ids; see ``equipoise/jit/addresses.py`` for why by addresses.

    Args:
        ids: address of (T, width) int64 logical experts, a row for each token; outside [0, E): none.
        scope_first, scope_last: rows of the scope's tokens, sorted by rank, this rank's among them.
        gathered: address of (num_gathered, E) int32 counts of the scope by rank; without rows, its ids are counted.
        own_row: this rank's row of ``gathered``.
        recorded, num_columns: as for ``count_slots_of``.
        slots: address of (last - first, width) int64, filled; -1 for none.
        tables: ``table_addresses``.
    """
    arrays, controls = tables_at(tables), controls_at(tables)
    rows, chosen = int64_at(ids, (scope_last, width)), int64_at(slots, (last - first, width))
    num_experts = arrays.row_of_expert.shape[1]
    counts, before = int32_zeros(num_experts), int_zeros(num_experts)
    if num_gathered > 0:
        add_gathered(int32_at(gathered, (num_gathered, num_experts)), own_row, counts, before)
    else:
        count_rows(rows, scope_first, first, counts, before)
    quotas = int32_table(arrays.slot.shape[1], arrays.slot.shape[2], 0)
    solve_layer(layer, counts, arrays, controls, quotas)
    _assign(layer, rows, first, last, counts, before, arrays, controls[ROTATION], quotas, chosen)
    count_slots_of(layer, chosen, recorded, num_columns)


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
