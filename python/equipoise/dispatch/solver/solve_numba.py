"""Solves the quotas of a layer's replicas from its counts, on a CPU: numba, bit for bit as ``quotas.py``.

The method is told there; here the same integers are computed row by row. Helpers take single arrays, and loops stand
where numpy has a function: each of those would cost numba a second to compile.
"""

from __future__ import annotations

import numpy as np

from equipoise.dispatch.solver.controls import (
    ACTIVE_COST,
    CROSS_COST,
    HOME_FIRST,
    HOME_LAST,
    ITERATIONS,
    MIN_SWEEP_TOKENS,
    ROTATION,
    SEES_ALL,
    SWEEPS,
)
from equipoise.dispatch.solver.level_numba import shifted_level
from equipoise.dispatch.solver.open_numba import add_choices, open_replicas
from equipoise.dispatch.solver.table_builder import (
    MAX_ACTIVE,
    MAX_UNITS,
    NUM_COLOURS,
    NUM_RANKS,
    NUM_REPLICAS,
    NUM_ROWS,
    WEIGHT_BITS,
    NumpyTables,
)
from equipoise.jit.compile import helper, int32_table, int_zeros

MAX_FRACTION_BITS = 10
MOMENTUM = np.array([0, 4, 6, 8, 9, 10, 10, 11, 11] + [12] * 55, dtype=np.int64)  # 16ths: min(k / (k + 3), 3 / 4)
PHASE_BITS = 16
EXPERT_STRIDE, SCOPE_STRIDE, PHASE_MASK = 25033, 40503, 0xFFFF  # golden ratio of 2**16 and of its rest: phases spread


@helper
def rounding_phase(row: int, rotation: int) -> int:
    """Where a row's rounding begins, in 65536ths of a token."""
    return (row * EXPERT_STRIDE + rotation * SCOPE_STRIDE) & PHASE_MASK


@helper
def solve_layer(layer: int, counts: np.ndarray, tables: NumpyTables, controls: np.ndarray, quotas: np.ndarray) -> None:
    """Fills ``quotas`` (M, C) int32, zero at first, from ``counts`` (E,) int32, the tokens of the scope."""
    limits, single = tables.sizes[layer], tables.rank_of_single[layer]
    rank, size, colour = tables.rank[layer], tables.num_choices[layer], tables.colour[layer]
    num_ranks, num_colours, rotation = limits[NUM_RANKS], limits[NUM_COLOURS], controls[ROTATION]
    base, active = int_zeros(num_ranks), int_zeros(num_ranks)
    total = 0
    for e in range(counts.shape[0]):
        total += counts[e]
        if single[e] >= 0:
            base[single[e]] += counts[e]
            active[single[e]] += counts[e] > 0 or not controls[SEES_ALL]
    tokens = int_zeros(limits[NUM_ROWS])
    for m in range(tokens.shape[0]):
        tokens[m] = counts[tables.expert[layer, m]]
    most = int(limits[MAX_UNITS])
    # Sixteenths of a token; more than all tokens together would change nothing.
    cost = min(controls[ACTIVE_COST], 16 * total, 16 * max(most - total, 0) // limits[MAX_ACTIVE])
    reach = total + ((cost * limits[MAX_ACTIVE]) >> 4)
    bits = 0
    while bits < MAX_FRACTION_BITS and reach <= most >> (bits + 1):
        bits += 1
    is_open = int32_table(tokens.shape[0], quotas.shape[1], 0)
    units, usual, sees_all = (cost << bits) >> 4, (total << bits) // limits[NUM_REPLICAS], controls[SEES_ALL]
    part, load = int_zeros(tokens.shape[0]), int_zeros(num_ranks)  # known, or what is usual: alike in all scopes
    for m in range(tokens.shape[0]):
        part[m] = tokens[m] << bits if sees_all else usual * size[m]
    for r in range(num_ranks):
        load[r] = (base[r] << bits if sees_all else usual * active[r]) + active[r] * units
    open_replicas(part, rank, size, colour, num_colours, rotation, units, sees_all, load, active, is_open)
    far = int_zeros(num_ranks)  # what a rank costs more because it is on another node
    for r in range(num_ranks):
        base[r] = (base[r] << bits) + active[r] * units
        if r < controls[HOME_FIRST] or r >= controls[HOME_LAST]:
            far[r] = min((((total << bits) // num_ranks) * controls[CROSS_COST]) >> 16, total << bits)
    best = int32_table(tokens.shape[0], quotas.shape[1], 0)
    _start(tokens, size, tables.weight[layer], is_open, bits, best)
    _descend(tokens, rank, size, tables.step[layer], controls[ITERATIONS], base, is_open, far, bits, best)
    _round(tokens, size, rotation, best, is_open, bits, quotas)
    if total >= controls[MIN_SWEEP_TOKENS]:
        for r in range(num_ranks):
            base[r] >>= bits
            far[r] >>= bits
        add_choices(rank, size, quotas, 1, base)
        for _ in range(controls[SWEEPS]):
            _sweep(tokens, rank, size, colour, num_colours, rotation, base, is_open, far, quotas)


@helper
def _start(
    tokens: np.ndarray, size: np.ndarray, weight: np.ndarray, is_open: np.ndarray, bits: int, x: np.ndarray
) -> None:
    """The planned shares of the open replicas; what they leave goes to the first open one."""
    for m in range(tokens.shape[0]):
        for j in range(size[m]):
            if is_open[m, j]:
                x[m, j] = ((tokens[m] << bits) * weight[m, j]) >> WEIGHT_BITS
        _give_first(tokens[m] << bits, m, size[m], is_open, x)


@helper
def _give_first(units: int, m: int, size: int, is_open: np.ndarray, x: np.ndarray) -> None:
    """Gives what a row lacks of its ``units`` to its first open replica."""
    first = -1
    for j in range(size):
        units -= x[m, j]
        if first < 0 and is_open[m, j]:
            first = j
    x[m, first] += units


@helper
def _descend(
    tokens: np.ndarray,
    rank: np.ndarray,
    size: np.ndarray,
    step: np.ndarray,
    iterations: int,
    base: np.ndarray,
    is_open: np.ndarray,
    far: np.ndarray,
    bits: int,
    best: np.ndarray,
) -> None:
    """Improves ``best`` (M, C), parts of each row's tokens in fixed point: the iterate with the least largest load."""
    num_ranks, rows = base.shape[0], tokens.shape[0]
    x, before = int32_table(rows, best.shape[1], 0), int32_table(rows, best.shape[1], 0)
    load, earlier, ahead, bid = (
        int_zeros(num_ranks),
        int_zeros(num_ranks),
        int_zeros(num_ranks),
        int_zeros(rank.shape[1]),
    )
    _copy(best, x)
    _copy(best, before)
    lowest = _loads(rank, size, x, base, load)
    for r in range(num_ranks):
        earlier[r] = load[r]
    for k in range(iterations):
        momentum = MOMENTUM[min(k, MOMENTUM.shape[0] - 1)]
        for r in range(num_ranks):
            ahead[r] = max(load[r] + ((momentum * (load[r] - earlier[r])) >> 4), 0) + far[r]
            earlier[r] = load[r]
        for m in range(rows):
            if tokens[m] == 0:  # most rows of a small batch, and its parts stay 0
                continue
            for j in range(size[m]):
                z = x[m, j] + ((momentum * (x[m, j] - before[m, j])) >> 4)
                bid[j] = ((2 * ahead[rank[m, j]] * step[m]) >> 32) - z
                before[m, j] = x[m, j]
            level = shifted_level(bid, tokens[m] << bits, is_open, m, size[m], 0)
            for j in range(size[m]):
                x[m, j] = max(level - bid[j], 0) if is_open[m, j] else 0
        largest = _loads(rank, size, x, base, load)
        if largest < lowest:
            lowest = largest
            _copy(x, best)


@helper
def _copy(source: np.ndarray, target: np.ndarray) -> None:
    for m in range(source.shape[0]):
        for j in range(source.shape[1]):
            target[m, j] = source[m, j]


@helper
def _loads(rank: np.ndarray, size: np.ndarray, x: np.ndarray, base: np.ndarray, load: np.ndarray) -> int:
    """Fills ``load`` with the loads of the ranks; returns the largest."""
    for r in range(base.shape[0]):
        load[r] = base[r]
    add_choices(rank, size, x, 1, load)
    largest = load[0]
    for r in range(1, base.shape[0]):
        largest = max(largest, load[r])
    return largest


@helper
def _round(
    tokens: np.ndarray,
    size: np.ndarray,
    rotation: int,
    best: np.ndarray,
    is_open: np.ndarray,
    bits: int,
    quotas: np.ndarray,
) -> None:
    """Whole tokens from fixed point: running sums are rounded down from a phase, so that a row's sum stays exact."""
    for m in range(tokens.shape[0]):
        _give_first(tokens[m] << bits, m, size[m], is_open, best)  # units that reciprocals have lost
        running = rounding_phase(m, rotation) >> (PHASE_BITS - bits)
        for j in range(size[m]):
            quotas[m, j] = ((running + best[m, j]) >> bits) - (running >> bits)
            running += best[m, j]


@helper
def _sweep(
    tokens: np.ndarray,
    rank: np.ndarray,
    size: np.ndarray,
    colour: np.ndarray,
    num_colours: int,
    rotation: int,
    load: np.ndarray,
    is_open: np.ndarray,
    far: np.ndarray,
    quotas: np.ndarray,
) -> None:
    """One pass of coordinate descent in whole tokens, colour by colour; ``load`` follows."""
    bid = int_zeros(rank.shape[1])
    for c in range(num_colours):
        for m in range(tokens.shape[0]):
            if colour[m] != c or tokens[m] == 0:
                continue
            for j in range(size[m]):
                load[rank[m, j]] -= quotas[m, j]
                bid[j] = load[rank[m, j]] + far[rank[m, j]]
            level = shifted_level(bid, tokens[m], is_open, m, size[m], 1)
            left = tokens[m]
            for j in range(size[m]):
                quotas[m, j] = max(level - bid[j], 0) if is_open[m, j] else 0
                left -= quotas[m, j]
            for turn in range(size[m]):
                j = (turn + size[m] - (m + rotation) % size[m]) % size[m]
                if left > 0 and is_open[m, j] and bid[j] <= level:
                    quotas[m, j] += 1
                    left -= 1
            for j in range(size[m]):
                load[rank[m, j]] += quotas[m, j]
