"""Tables and controls of dispatch by the batch as one vector of addresses and sizes: one argument of a kernel."""

from __future__ import annotations

import numpy as np

from equipoise.dispatch.solver.controls import NUM_CONTROLS
from equipoise.dispatch.solver.table_builder import NUM_SIZES, NumpyTables, TableArrays
from equipoise.jit.addresses import int32_at
from equipoise.jit.compile import helper

_CONTROLS = len(TableArrays._fields)  # the addresses of the tables come before, in their order
_LAYERS, _ROWS, _CHOICES, _EXPERTS, _RANK_CHOICES, _RANK_SLOTS, _RANKS = range(_CONTROLS + 1, _CONTROLS + 8)


def table_addresses(tables: NumpyTables, controls: np.ndarray) -> np.ndarray:
    """int64 vector for :func:`tables_at` and :func:`controls_at`; good while the arrays are."""
    num_layers, rows, choices = tables.slot.shape
    _, rank_choices, ranks = tables.choices_of_rank.shape
    sizes = (num_layers, rows, choices, tables.row_of_expert.shape[1], rank_choices, tables.singles_of_rank.shape[1])
    arrays = (*tables, controls)
    assert all(array.dtype == np.int32 and array.flags.c_contiguous for array in arrays)
    return np.array([*(array.ctypes.data for array in arrays), *sizes, ranks], dtype=np.int64)


@helper
def tables_at(vector: np.ndarray) -> NumpyTables:
    """The tables."""
    by_row, by_expert = (vector[_LAYERS], vector[_ROWS]), (vector[_LAYERS], vector[_EXPERTS])
    by_choice = (vector[_LAYERS], vector[_ROWS], vector[_CHOICES])
    return TableArrays(
        int32_at(vector[0], by_row),
        int32_at(vector[1], by_row),
        int32_at(vector[2], by_choice),
        int32_at(vector[3], by_choice),
        int32_at(vector[4], by_choice),
        int32_at(vector[5], by_row),
        int32_at(vector[6], by_row),
        int32_at(vector[7], by_expert),
        int32_at(vector[8], by_expert),
        int32_at(vector[9], by_expert),
        int32_at(vector[10], (vector[_LAYERS], vector[_RANK_CHOICES], vector[_RANKS])),
        int32_at(vector[11], (vector[_LAYERS], vector[_RANK_SLOTS], vector[_RANKS])),
        int32_at(vector[12], (vector[_LAYERS], NUM_SIZES)),
    )


@helper
def controls_at(vector: np.ndarray) -> np.ndarray:
    """(NUM_CONTROLS,) int32."""
    return int32_at(vector[_CONTROLS], (NUM_CONTROLS,))
