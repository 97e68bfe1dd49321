"""Parts of the kernels that solve quotas: Triton functions on tiles of (choices, rows), rows along the lanes.

All arithmetic is int32, int64 where said, and non-negative where it is divided, so that torch, Triton's interpreter
and the GPU agree bit for bit with ``quotas.py``, whose names are used here. Tile sizes are powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGE = tl.constexpr(1 << 30)


@triton.jit
def rank_loads(x, base, places, C: tl.constexpr, M: tl.constexpr, D: tl.constexpr, G: tl.constexpr):
    """(G,) ``base`` plus what the choices of each rank take; ``places`` (D * G,) looks them up, -1 for none."""
    taken = tl.gather(tl.reshape(x, [C * M]), tl.maximum(places, 0), 0)
    return base + tl.sum(tl.reshape(tl.where(places >= 0, taken, 0), [D, G]), 0)


@triton.jit
def of_ranks(values, ranks, C: tl.constexpr, M: tl.constexpr):
    """(C, M) the value of each choice's rank; ``ranks`` (C * M,)."""
    return tl.reshape(tl.gather(values, ranks, 0), [C, M])


@triton.jit
def fill_level(bids, tokens, is_open, C: tl.constexpr, EXACT: tl.constexpr):
    """Level (M,) up to which ``tokens`` fill the open choices, and the bids shifted to a least of 0."""
    least = tl.min(tl.where(is_open, bids, LARGE), 0)
    bids = tl.where(is_open, tl.minimum(bids - least[None, :], tokens[None, :] + 1), tokens[None, :] + 1)
    level = tokens + 1
    for _ in range(C):
        below = is_open & (bids <= level[None, :])
        number = tl.sum(below.to(tl.int32), 0)
        total = tokens + tl.sum(tl.where(below, bids, 0), 0)
        if EXACT:
            lower = total // tl.maximum(number, 1)
        else:
            reciprocal = tl.full(number.shape, 0x7FFFFFFF, tl.int32)
            for n in tl.static_range(2, C + 1):
                reciprocal = tl.where(number == n, (1 << 31) // n, reciprocal)
            lower = tl.umulhi((2 * total).to(tl.uint32), reciprocal.to(tl.uint32)).to(tl.int32)
        level = tl.minimum(level, lower)
    return level, bids


@triton.jit
def fill_whole(bids, tokens, is_open, places, size, rotation, C: tl.constexpr, M: tl.constexpr):
    """(C, M) whole tokens that level the bids; what is left over goes to reached choices in rotated order."""
    level, bids = fill_level(bids, tokens, is_open, C, True)
    x = tl.where(is_open, tl.maximum(level[None, :] - bids, 0), 0)
    left = tokens - tl.sum(x, 0)
    reached = (is_open & (bids <= level[None, :])).to(tl.int32)
    before = count_before(reached, places, size, rotation, C, M)
    return x + tl.where(before < left[None, :], reached, 0)


@triton.jit
def count_before(marked, places, size, rotation, C: tl.constexpr, M: tl.constexpr):
    """(C, M) how many marked choices of a row come before each one in rotated order.

    One row of the tile at a time: a (C, C, M) comparison would not fit into registers.
    """
    column, row = tl.arange(0, C)[:, None], tl.arange(0, M)
    before = tl.zeros([C, M], tl.int32)
    for j in range(C):
        is_marked = tl.sum(tl.where(column == j, marked, 0), 0)
        place = (j + row + rotation) % size
        before += tl.where(place[None, :] < places, is_marked[None, :], 0)
    return before


@triton.jit
def open_least(loads, is_choice, places, size, rotation, num_open, C: tl.constexpr, M: tl.constexpr):
    """(C, M) int32, 1 for the ``num_open`` choices with the least loads; of equal ones, in rotated order."""
    column, row = tl.arange(0, C)[:, None], tl.arange(0, M)
    before = tl.zeros([C, M], tl.int32)
    for j in range(C):
        other = tl.sum(tl.where(column == j, loads, 0), 0)[None, :]
        place = ((j + row + rotation) % size)[None, :]
        first = (other < loads) | ((other == loads) & (place < places))
        before += (first & (j < size)[None, :]).to(tl.int32)
    return (is_choice & (before < num_open[None, :])).to(tl.int32)


@triton.jit
def first_open(is_open):
    """(C, M) bool, the first open choice of each row."""
    opened = is_open.to(tl.int32)
    return is_open & (tl.cumsum(opened, 0) == 1)
