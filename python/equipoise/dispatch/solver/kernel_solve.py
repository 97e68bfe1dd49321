"""The solve of one layer's quotas inside a Triton program: ``quotas.py`` step by step, on tiles of (choices, rows)."""

from __future__ import annotations

import triton
import triton.language as tl

from equipoise.dispatch.solver import controls as control
from equipoise.dispatch.solver import table_builder
from equipoise.dispatch.solver.kernel_parts import (
    fill_level,
    fill_whole,
    first_open,
    of_ranks,
    open_least,
    rank_loads,
)
from equipoise.dispatch.solver.open_numba import RECHOICES as _RECHOICES
from equipoise.dispatch.solver.open_numba import UNSEEN_SHIFT as _UNSEEN_SHIFT
from equipoise.dispatch.solver.solve_numba import (
    EXPERT_STRIDE as _EXPERT_STRIDE,
)
from equipoise.dispatch.solver.solve_numba import (
    MAX_FRACTION_BITS as _MAX_FRACTION_BITS,
)
from equipoise.dispatch.solver.solve_numba import (
    MOMENTUM as _MOMENTUM,
)
from equipoise.dispatch.solver.solve_numba import (
    SCOPE_STRIDE as _SCOPE_STRIDE,
)

RECHOICES, UNSEEN_SHIFT = tl.constexpr(_RECHOICES), tl.constexpr(_UNSEEN_SHIFT)
EXPERT_STRIDE, SCOPE_STRIDE = tl.constexpr(_EXPERT_STRIDE), tl.constexpr(_SCOPE_STRIDE)
MAX_FRACTION_BITS, LAST_MOMENTUM = tl.constexpr(_MAX_FRACTION_BITS), tl.constexpr(len(_MOMENTUM) - 1)
ROTATION, ITERATIONS, SWEEPS = (tl.constexpr(i) for i in (control.ROTATION, control.ITERATIONS, control.SWEEPS))
MIN_SWEEP_TOKENS, SEES_ALL = tl.constexpr(control.MIN_SWEEP_TOKENS), tl.constexpr(control.SEES_ALL)
ACTIVE_COST, CROSS_COST = tl.constexpr(control.ACTIVE_COST), tl.constexpr(control.CROSS_COST)
HOME_FIRST, HOME_LAST = tl.constexpr(control.HOME_FIRST), tl.constexpr(control.HOME_LAST)
NUM_COLOURS, MAX_UNITS = tl.constexpr(table_builder.NUM_COLOURS), tl.constexpr(table_builder.MAX_UNITS)
NUM_RANKS, MAX_ACTIVE = tl.constexpr(table_builder.NUM_RANKS), tl.constexpr(table_builder.MAX_ACTIVE)
NUM_REPLICAS, WEIGHT_BITS = tl.constexpr(table_builder.NUM_REPLICAS), tl.constexpr(table_builder.WEIGHT_BITS)


@triton.jit
def solve(
    counts, expert, num_choices, rank, weight, colour, step, choices_of_rank, singles_of_rank, sizes, controls,
    momentum, quotas, inverses, starts,
    M: tl.constexpr, C: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Stores quotas (M, C), their inverses (M, C), and starts (2, M): where each row begins, and its tokens."""
    row, column = tl.arange(0, M), tl.arange(0, C)[:, None]
    tile = row[None, :] * C + column
    rotation = tl.load(controls + ROTATION)
    of_row = tl.load(expert + row)
    # .cg: other programs have just written the counts, and L1 may hold what was there before.
    tokens = tl.load(counts + tl.maximum(of_row, 0), mask=of_row >= 0, other=0, cache_modifier=".cg")
    size = tl.load(num_choices + row)
    is_choice = column < size[None, :]
    divisor = tl.maximum(size, 1)
    turns = (column + row[None, :] + rotation) % divisor[None, :]
    places = tl.load(choices_of_rank + tl.arange(0, D * G))
    sees_all = tl.load(controls + SEES_ALL) > 0
    base, active = _singles(counts, singles_of_rank, sees_all, D, G)
    total = tl.sum(base) + tl.sum(tokens)
    units, bits = _scale(total, sizes, controls)
    opened, active = _open_rows(
        tokens, size, is_choice, turns, divisor, rotation, rank, places, base, active, total, units, bits, sees_all,
        colour, sizes, M, C, D, G,
    )  # fmt: skip
    is_open = opened > 0
    base = (base << bits) + active * units
    rank_of = tl.reshape(tl.maximum(tl.load(rank + tile), 0), [C * M])
    far = _price_of_ranks(total, bits, sizes, controls, G)
    x = _descend(
        tokens << bits, is_open, tl.load(weight + tile), step, rank_of, places, base, far, controls, momentum,
        M, C, D, G,
    )  # fmt: skip
    phase = (row * EXPERT_STRIDE + rotation * SCOPE_STRIDE) & 0xFFFF
    running = tl.cumsum(x, 0) + (phase >> (16 - bits))[None, :]
    x = (running >> bits) - ((running - x) >> bits)
    if total >= tl.load(controls + MIN_SWEEP_TOKENS):
        base, far, colours = base >> bits, far >> bits, tl.load(colour + row)
        for _ in range(tl.load(controls + SWEEPS)):
            for c in range(tl.load(sizes + NUM_COLOURS)):
                load = rank_loads(x, base, places, C, M, D, G) + far
                bids = of_ranks(load, rank_of, C, M) - x
                y = fill_whole(bids, tokens, is_open, turns, divisor, rotation, C, M)
                x = tl.where((colours == c)[None, :], y, x)
    tl.store(quotas + tile, x)
    _store_division(x, tokens, phase, tile, row, inverses, starts, M)


@triton.jit
def _singles(counts, singles_of_rank, sees_all, D: tl.constexpr, G: tl.constexpr):
    """(G,) tokens of the experts that only one rank holds, and how many of those experts are activated."""
    ranks = tl.arange(0, G)
    base, active = tl.zeros([G], tl.int32), tl.zeros([G], tl.int32)
    for s in range(D):
        single = tl.load(singles_of_rank + s * G + ranks)
        held = tl.load(counts + tl.maximum(single, 0), mask=single >= 0, other=0, cache_modifier=".cg")
        base += held
        active += ((single >= 0) & ((held > 0) | (not sees_all))).to(tl.int32)
    return base, active


@triton.jit
def _scale(total, sizes, controls):
    """Cost of an activated expert in fixed point, and its fraction bits: as many as fit."""
    most, max_active = tl.load(sizes + MAX_UNITS), tl.load(sizes + MAX_ACTIVE)
    room = 16 * tl.maximum(most - total, 0).to(tl.int64) // max_active
    cost = tl.minimum(tl.minimum(tl.load(controls + ACTIVE_COST).to(tl.int64), 16 * total.to(tl.int64)), room)
    reach = total + ((cost * max_active) >> 4)
    bits = 0
    for b in tl.static_range(1, MAX_FRACTION_BITS + 1):
        bits += (reach <= (most >> b)).to(tl.int32)
    return ((cost << bits) >> 4).to(tl.int32), bits


@triton.jit
def _open_rows(
    tokens, size, is_choice, turns, divisor, rotation, rank, places, base, active, total, units, bits, sees_all,
    colour, sizes,
    M: tl.constexpr, C: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """(C, M) int32, 1 for each replica that opens; and ``active`` with those of rows that have tokens."""
    column = tl.arange(0, C)[:, None]
    opened = is_choice.to(tl.int32)
    if units > 0:
        usual = (total << bits) // tl.load(sizes + NUM_REPLICAS)
        part = tl.where(sees_all, tokens << bits, usual * size)
        fixed = tl.where(sees_all, base << bits, usual * active) + active * units
        num_open = tl.minimum(tl.maximum((part + units // 2) // units, 1), size)
        opened = (column < num_open[None, :]).to(tl.int32)
        if sees_all:
            each, colours = _each(part, num_open, units), tl.load(colour + tl.arange(0, M))
            # Loaded here and not passed in: kept beside all else, it takes registers that wide tiles do not have.
            rank_of = tl.reshape(tl.maximum(tl.load(rank + tl.arange(0, M)[None, :] * C + column), 0), [C * M])
            for _ in range(RECHOICES):
                for c in range(tl.load(sizes + NUM_COLOURS)):
                    mine = (colours == c)[None, :]
                    others = tl.where(mine, 0, opened * each[None, :])
                    loads = of_ranks(rank_loads(others, fixed, places, C, M, D, G), rank_of, C, M)
                    least = open_least(loads, is_choice, turns, divisor, rotation, num_open, C, M)
                    opened = tl.where(mine, least, opened)
        few = _busiest(opened, part, num_open, units, fixed, places, C, M, D, G)
        margin = tl.where(sees_all, 0, units >> UNSEEN_SHIFT)
        if _busiest(is_choice.to(tl.int32), part, size, units, fixed, places, C, M, D, G) + margin < few:
            opened = is_choice.to(tl.int32)
        active = rank_loads(opened * (part > 0).to(tl.int32)[None, :], active, places, C, M, D, G)
    return opened, active


@triton.jit
def _each(part, number, units):
    """(M,) what each of ``number`` open replicas of a row costs its rank; 0 for a row without tokens."""
    return tl.where(part > 0, part // tl.maximum(number, 1) + units, 0)


@triton.jit
def _busiest(
    opened, part, number, units, fixed, places, C: tl.constexpr, M: tl.constexpr, D: tl.constexpr, G: tl.constexpr
):
    """Largest rank load where each row's ``part`` is shared alike by its open replicas."""
    return tl.max(rank_loads(opened * _each(part, number, units)[None, :], fixed, places, C, M, D, G))


@triton.jit
def _price_of_ranks(total, bits, sizes, controls, G: tl.constexpr):
    """(G,) what a rank costs more because it is on another node."""
    ranks = tl.arange(0, G)
    mean = (total << bits) // tl.load(sizes + NUM_RANKS)
    price = tl.minimum((mean.to(tl.int64) * tl.load(controls + CROSS_COST)) >> 16, total.to(tl.int64) << bits)
    is_home = (ranks >= tl.load(controls + HOME_FIRST)) & (ranks < tl.load(controls + HOME_LAST))
    return tl.where(is_home, 0, price.to(tl.int32))


@triton.jit
def _descend(
    units, is_open, weight, step, rank_of, places, base, far, controls, momentum,
    M: tl.constexpr, C: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """(C, M) parts of each row's ``units`` in fixed point: the iterate with the least largest load."""
    x = ((units[None, :].to(tl.int64) * weight) >> WEIGHT_BITS).to(tl.int32)
    x = tl.where(is_open, x, 0)
    to_first = first_open(is_open)
    x += tl.where(to_first, (units - tl.sum(x, 0))[None, :], 0)
    load = rank_loads(x, base, places, C, M, D, G)
    before, earlier, best, lowest = x, load, x, tl.max(load)
    inverse_step = tl.load(step + tl.arange(0, M)).to(tl.uint32)[None, :]
    for k in range(tl.load(controls + ITERATIONS)):
        factor = tl.load(momentum + tl.minimum(k, LAST_MOMENTUM))
        z = x + ((factor * (x - before)) >> 4)
        ahead = tl.maximum(load + ((factor * (load - earlier)) >> 4), 0) + far
        scaled = tl.umulhi((2 * of_ranks(ahead, rank_of, C, M)).to(tl.uint32), inverse_step)
        before, earlier = x, load
        level, bids = fill_level(scaled.to(tl.int32) - z, units, is_open, C, False)
        x = tl.where(is_open, tl.maximum(level[None, :] - bids, 0), 0)
        load = rank_loads(x, base, places, C, M, D, G)
        largest = tl.max(load)
        best = tl.where(largest < lowest, x, best)
        lowest = tl.minimum(lowest, largest)
    # Units that reciprocals have lost come back.
    return best + tl.where(to_first, (units - tl.sum(best, 0))[None, :], 0)


@triton.jit
def _store_division(x, tokens, phase, tile, row, inverses, starts, M: tl.constexpr):
    """Stores what ``assign`` divides by (``assign.py``, ``quota_inverses``)."""
    wide = x.to(tl.int64)
    left = tl.sum(wide, 0)[None, :] - tl.cumsum(wide, 0) + wide
    inverse = tl.where(left > 0, ((wide << 32) + left - 1) // tl.maximum(left, 1), 0)
    inverse = tl.where((wide > 0) & (wide == left), 0xFFFFFFFF, inverse)
    tl.store(inverses + tile, inverse.to(tl.uint32).to(tl.int32, bitcast=True))
    tl.store(starts + row, ((tokens.to(tl.int64) * phase) >> 16).to(tl.int32))
    tl.store(starts + M + row, tokens)
