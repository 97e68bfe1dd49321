"""Chooses which replicas of a layer a batch opens, where an activated expert has a cost: numba."""

from __future__ import annotations

import numpy as np

from equipoise.jit.compile import helper, int_zeros

RECHOICES = 2  # rounds in which each row chooses again which replicas it opens


@helper
def open_replicas(
    tokens: np.ndarray,
    rank: np.ndarray,
    size: np.ndarray,
    colour: np.ndarray,
    num_colours: int,
    rotation: int,
    cost: int,
    bits: int,
    base: np.ndarray,
    active: np.ndarray,
    is_open: np.ndarray,
) -> None:
    """Opens of each row as many replicas as pay, in ``is_open`` (M, C); adds them to ``active`` (G,).

    Args:
        num_colours: 0 where rows must not choose again by load, but open the first.
        cost: of an activated expert, in sixteenths of a token; 0: all replicas open.
    """
    num_open, each, load = int_zeros(tokens.shape[0]), int_zeros(tokens.shape[0]), int_zeros(base.shape[0])
    for m in range(tokens.shape[0]):
        num_open[m] = size[m] if cost == 0 else min(max((16 * tokens[m] + cost // 2) // cost, 1), size[m])
        for j in range(num_open[m]):
            is_open[m, j] = 1
        if tokens[m] > 0:
            each[m] = (tokens[m] << bits) // num_open[m] + ((cost << bits) >> 4)
    if cost == 0:
        return
    if num_colours > 0:
        for r in range(base.shape[0]):
            load[r] = (base[r] << bits) + active[r] * ((cost << bits) >> 4)
        for m in range(tokens.shape[0]):
            _add_row(m, rank, size, is_open, each[m], load)
        for _ in range(RECHOICES):
            for c in range(num_colours):
                for m in range(tokens.shape[0]):
                    if colour[m] == c:
                        _add_row(m, rank, size, is_open, -each[m], load)
                        _open_least(m, rank, size[m], rotation, num_open[m], load, is_open)
                        _add_row(m, rank, size, is_open, each[m], load)
    for m in range(tokens.shape[0]):
        if tokens[m] > 0:
            _add_row(m, rank, size, is_open, 1, active)


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
