"""Chooses the nearest replica, or replicas in turns, and counts the slots: one Triton kernel, as ``turns_numba.py``.

Uniform numbers are integers below 2**24, exact in float32, and so is their comparison with the cumulative weights: no
float64, no rounding, the same slots as in torch and numba. Two reads follow one another: the id, then its expert's
row. Of the row, four replicas are read at a time, slots beside weights and not after them; four more only where a token
of the block falls beyond these.
"""

from __future__ import annotations

import triton
import triton.language as tl

from equipoise.dispatch.replicas import CHOICE_STRIDE as _CHOICE_STRIDE
from equipoise.dispatch.replicas import GOLDEN as _GOLDEN
from equipoise.dispatch.replicas import LAYER_STRIDE as _LAYER_STRIDE
from equipoise.dispatch.replicas import RANK_STRIDE as _RANK_STRIDE

GOLDEN, CHOICE_STRIDE = tl.constexpr(_GOLDEN), tl.constexpr(_CHOICE_STRIDE)
LAYER_STRIDE, RANK_STRIDE = tl.constexpr(_LAYER_STRIDE), tl.constexpr(_RANK_STRIDE)


# Nothing is specialized: a batch of 16 tokens, of 1 and of 17, of layer 1 and of layer 2, share one compiled kernel.
@triton.jit(
    do_not_specialize=[
        "ids", "slots", "num_ids", "first_token", "num_unpadded", "layer", "own_rank", "next_token", "table", "cdf",
        "recorded", "none",
    ]
)  # fmt: skip
def choose(
    ids, slots, num_ids, first_token, num_unpadded, layer, own_rank, next_token, table, cdf, recorded, none,
    E: tl.constexpr, X: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    TURNS: tl.constexpr, PADDED: tl.constexpr, RECORD: tl.constexpr,
):  # fmt: skip
    """Fills ``slots`` (num_ids,) for the ids from token ``first_token`` on, K of a token; -1 for none.

    With TURNS, ``table`` (L, E, X) and ``cdf`` (L, E, X) are those of ``sample_replicas`` and ``next_token`` (1,)
    numbers the first token; without, ``table`` (L, E) is the answer. With PADDED, tokens from ``num_unpadded`` (1,) on
    are none. With RECORD, the slots are added to ``recorded`` (none + 1), "none" in its last column.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mine, token = index < num_ids, index // K
    e = tl.load(ids + first_token.to(tl.int64) * K + index, mask=mine, other=-1)
    real = (e >= 0) & (e < E)
    if PADDED:
        real = real & (first_token + token < tl.load(num_unpadded))
    row = layer * E + tl.where(real, e, 0).to(tl.int32)
    if TURNS:
        number = tl.load(next_token).to(tl.uint32) + token.to(tl.uint32)
        offset = layer.to(tl.uint32) * LAYER_STRIDE + own_rank.to(tl.uint32) * RANK_STRIDE
        mixed = number * GOLDEN + (index % K).to(tl.uint32) * CHOICE_STRIDE + offset
        slot = _sample((mixed >> 8).to(tl.float32) * 2.0**-24, row * X, real, table, cdf, X)
    else:
        slot = tl.load(table + row)
    tl.store(slots + index, tl.where(real, slot, -1).to(slots.dtype.element_ty), mask=mine)
    if RECORD:
        tl.atomic_add(recorded + tl.where(real, slot, none), 1, mask=mine, sem="relaxed")


@triton.jit
def _sample(uniform, row, beyond, table, cdf, X: tl.constexpr):
    """The slot of the first replica whose cumulative weight is above ``uniform``; ``row`` is where replicas begin.

    ``beyond`` marks whose are asked for, and then those that the replicas read so far leave.
    """
    slot, first, some_are_beyond = tl.zeros(row.shape, tl.int64), 0, 1
    while some_are_beyond > 0:
        # All are read before any is compared: the reads then wait for memory together.
        at = row + first
        at_1 = row + tl.minimum(first + 1, X - 1)
        at_2 = row + tl.minimum(first + 2, X - 1)
        at_3 = row + tl.minimum(first + 3, X - 1)
        slot_0 = tl.load(table + at, mask=beyond, other=0)
        slot_1 = tl.load(table + at_1, mask=beyond, other=0)
        slot_2 = tl.load(table + at_2, mask=beyond, other=0)
        slot_3 = tl.load(table + at_3, mask=beyond, other=0)
        beyond_0 = uniform >= tl.load(cdf + at, mask=beyond, other=1.0)
        beyond_1 = uniform >= tl.load(cdf + at_1, mask=beyond, other=1.0)
        beyond_2 = uniform >= tl.load(cdf + at_2, mask=beyond, other=1.0)
        beyond_3 = uniform >= tl.load(cdf + at_3, mask=beyond, other=1.0)
        found = tl.where(beyond_0, tl.where(beyond_1, tl.where(beyond_2, slot_3, slot_2), slot_1), slot_0)
        slot = tl.where(beyond, found, slot)
        beyond = beyond & beyond_3
        first += 4
        some_are_beyond = tl.where(first < X, tl.max(beyond.to(tl.int32)), 0)
    return slot
