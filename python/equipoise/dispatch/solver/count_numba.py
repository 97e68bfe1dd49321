"""Counts the tokens that a solve is made for, and the slots that were chosen: helpers of numba kernels."""

from __future__ import annotations

import numpy as np

from equipoise.jit.addresses import int32_at
from equipoise.jit.compile import helper


@helper
def count_rows(ids: np.ndarray, scope_first: int, first: int, counts: np.ndarray, before: np.ndarray) -> None:
    """Adds the tokens of a scope, rows of ``ids`` from ``scope_first`` on, by expert.

    Args:
        ids: (T, K) int64 logical experts; outside [0, E): none.
        first: this rank's first row; those of the scope before it belong to ranks before this one.
        counts: (E,), of all.
        before: (E,), of the ranks before this one.
    """
    num_experts = counts.shape[0]
    for t in range(scope_first, ids.shape[0]):
        for k in range(ids.shape[1]):
            if 0 <= ids[t, k] < num_experts:
                counts[ids[t, k]] += 1
                before[ids[t, k]] += t < first


@helper
def add_gathered(gathered: np.ndarray, own_row: int, counts: np.ndarray, before: np.ndarray) -> None:
    """Adds (ranks of the scope, E) gathered counts; the others as for :func:`count_rows`."""
    for row in range(gathered.shape[0]):
        for e in range(counts.shape[0]):
            counts[e] += gathered[row, e]
            before[e] += gathered[row, e] if row < own_row else 0


@helper
def count_slots_of(layer: int, chosen: np.ndarray, recorded: int, num_columns: int) -> None:
    """Adds (n, K) chosen slots to the counts of a layer.

    Args:
        chosen: int64 slots; -1 for none.
        recorded: address of (L, num_columns) int32, "none" in the last column.
        num_columns: 0 where nobody counts.
    """
    if num_columns == 0:
        return
    counts = int32_at(recorded, (layer + 1, num_columns))[layer]
    for t in range(chosen.shape[0]):
        for k in range(chosen.shape[1]):
            counts[chosen[t, k] if chosen[t, k] >= 0 else num_columns - 1] += 1
