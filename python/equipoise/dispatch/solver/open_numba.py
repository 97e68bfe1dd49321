"""Chooses which replicas of a layer a batch opens, where an activated expert has a cost: numba."""

from __future__ import annotations

import numpy as np

from equipoise.jit.compile import helper, int_zeros

UNSEEN_SHIFT = 4  # where others' tokens are not seen, all replicas must save this part, 1 / 2**4, of an activation
RECHOICES = 2  # rounds in which each row chooses again which replicas it opens


@helper
def open_replicas(
    part: np.ndarray,
    rank: np.ndarray,
    size: np.ndarray,
    colour: np.ndarray,
    num_colours: int,
    rotation: int,
    units: int,
    sees_all: int,
    load: np.ndarray,
    active: np.ndarray,
    is_open: np.ndarray,
) -> None:
    """Opens of each row as many replicas as pay, in ``is_open`` (M, C); adds them to ``active`` (G,).

    Args:
        part: (M,) what each row is taken to have, in fixed point.
        units: cost of an activated expert, in fixed point; 0: all replicas open.
        load: (G,) what each rank is taken to have without the rows; it is overwritten.
    """
    rows, num_ranks = part.shape[0], load.shape[0]
    if units == 0:
        for m in range(rows):
            for j in range(size[m]):
                is_open[m, j] = 1
        return
    num_open, each, with_all = int_zeros(rows), int_zeros(rows), int_zeros(num_ranks)
    for r in range(num_ranks):
        with_all[r] = load[r]
    for m in range(rows):
        num_open[m] = min(max((part[m] + units // 2) // units, 1), size[m])
        each[m] = part[m] // num_open[m] + units if part[m] > 0 else 0
        for j in range(num_open[m]):
            is_open[m, j] = 1
        for j in range(size[m]):
            with_all[rank[m, j]] += part[m] // size[m] + units if part[m] > 0 else 0
        _add_row(m, rank, size, is_open, each[m], load)
    for _ in range(RECHOICES * sees_all):
        for c in range(num_colours):
            for m in range(rows):
                if colour[m] == c:
                    _add_row(m, rank, size, is_open, -each[m], load)
                    _open_least(m, rank, size[m], rotation, num_open[m], load, is_open)
                    _add_row(m, rank, size, is_open, each[m], load)
    busiest, busiest_with_all = load[0], with_all[0]
    for r in range(num_ranks):
        busiest, busiest_with_all = max(busiest, load[r]), max(busiest_with_all, with_all[r])
    all_pay = busiest_with_all + (0 if sees_all else units >> UNSEEN_SHIFT) < busiest
    for m in range(rows):
        for j in range(size[m]):
            is_open[m, j] |= all_pay
            active[rank[m, j]] += is_open[m, j] if part[m] > 0 else 0


@helper
def add_choices(rank: np.ndarray, size: np.ndarray, x: np.ndarray, each: int, load: np.ndarray) -> None:
    """Adds ``each * x`` (M, C) to the ranks of the choices."""
    for m in range(x.shape[0]):
        _add_row(m, rank, size, x, each, load)


@helper
def _add_row(m: int, rank: np.ndarray, size: np.ndarray, x: np.ndarray, each: int, load: np.ndarray) -> None:
    for j in range(size[m]):
        load[rank[m, j]] += each * x[m, j]


@helper
def _open_least(
    m: int, rank: np.ndarray, size: int, rotation: int, num_open: int, load: np.ndarray, is_open: np.ndarray
) -> None:
    """Opens the ``num_open`` choices of a row whose ranks have the least load; of equal ones, in rotated order."""
    for j in range(size):
        before = 0
        mine, my_place = load[rank[m, j]], (j + m + rotation) % size
        for i in range(size):
            other = load[rank[m, i]]
            before += other < mine or (other == mine and (i + m + rotation) % size < my_place)
        is_open[m, j] = before < num_open
