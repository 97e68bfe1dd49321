"""Chooses the nearest replica, or replicas in turns, and counts the slots: numba, bit for bit as ``replicas.py``."""

from __future__ import annotations

from equipoise.dispatch.replicas import CHOICE_STRIDE, GOLDEN, LAYER_STRIDE, MASK32, RANK_STRIDE
from equipoise.dispatch.solver.count_numba import count_slots_of
from equipoise.jit.addresses import float32_at, int64_at
from equipoise.jit.compile import kernel


@kernel
def take_nearest(
    layer: int,
    ids: int,
    first: int,
    last: int,
    width: int,
    nearest: int,
    num_experts: int,
    recorded: int,
    num_columns: int,
    slots: int,
) -> None:
    """Slots for rows ``first`` to ``last`` of the ids, from a table of nearest replicas.

    Args:
        ids: address of (T, width) int64 logical experts, a row for each token; outside [0, E): none.
        nearest: address of (L, num_experts) int64 slots.
        recorded: address of (L, num_columns) int32, to which the slots are added, "none" in the last column; without
            columns nobody counts.
        slots: address of (last - first, width) int64, filled; -1 for none.
    """
    rows, chosen = int64_at(ids, (last, width)), int64_at(slots, (last - first, width))
    table = int64_at(nearest, (layer + 1, num_experts))[layer]
    for t in range(first, last):
        for k in range(width):
            e = rows[t, k]
            chosen[t - first, k] = table[e] if 0 <= e < num_experts else -1
    count_slots_of(layer, chosen, recorded, num_columns)


@kernel
def take_turns(
    layer: int,
    ids: int,
    first: int,
    last: int,
    width: int,
    first_number: int,
    rank: int,
    slot_of_replica: int,
    cdf: int,
    num_experts: int,
    num_replicas: int,
    recorded: int,
    num_columns: int,
    slots: int,
) -> None:
    """Slots by planned weight; arguments as for :func:`take_nearest`, and those of ``sample_replicas``.

    Args:
        first_number: of token ``first``, in the sequence of turns.
        slot_of_replica: address of (L, num_experts, num_replicas) int64.
        cdf: address of (L, num_experts, num_replicas) float32.
    """
    rows, chosen = int64_at(ids, (last, width)), int64_at(slots, (last - first, width))
    shape = (layer + 1, num_experts, num_replicas)
    slots_of, sums = int64_at(slot_of_replica, shape)[layer], float32_at(cdf, shape)[layer]
    offset = layer * LAYER_STRIDE + rank * RANK_STRIDE
    for t in range(first, last):
        turn = ((first_number + t - first) & MASK32) * GOLDEN + offset
        for k in range(width):
            e, slot = rows[t, k], -1
            if 0 <= e < num_experts:
                uniform = (((turn + k * CHOICE_STRIDE) & MASK32) >> 8) * 2.0**-24
                replica = 0
                while uniform >= sums[e, replica]:
                    replica += 1
                slot = slots_of[e, replica]
            chosen[t - first, k] = slot
    count_slots_of(layer, chosen, recorded, num_columns)
