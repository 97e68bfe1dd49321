"""Chooses the nearest replica, or replicas in turns, and counts the slots: numba, bit for bit as ``replicas.py``."""

from __future__ import annotations

import numpy as np

from equipoise.dispatch.replicas import CHOICE_STRIDE, GOLDEN, LAYER_STRIDE, MASK32, RANK_STRIDE
from equipoise.jit.compile import kernel


@kernel
def take_nearest(layer: int, ids: np.ndarray, nearest: np.ndarray, recorded: np.ndarray, slots: np.ndarray) -> None:
    """Fills ``slots`` from ``nearest`` (L, E) int64.

    Args:
        ids: (T, K) logical experts, a row for each token; outside [0, E): none.
        recorded: (L, P + 1) int32, to which the slots are added, "none" in the last column; (0, 0): nobody counts.
        slots: (T, K) of the dtype of ``ids``; -1 for none.
    """
    num_experts, none = nearest.shape[1], recorded.shape[1] - 1
    for t in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            e = ids[t, k]
            slot = nearest[layer, e] if 0 <= e < num_experts else -1
            slots[t, k] = slot
            if none >= 0:
                recorded[layer, slot if slot >= 0 else none] += 1


@kernel
def take_turns(
    layer: int,
    ids: np.ndarray,
    first_number: int,
    rank: int,
    slot_of_replica: np.ndarray,
    cdf: np.ndarray,
    recorded: np.ndarray,
    slots: np.ndarray,
) -> None:
    """Fills ``slots`` by planned weight; arguments as for :func:`take_nearest`, and those of ``sample_replicas``.

    Args:
        first_number: of the first token, in the sequence of turns.
        slot_of_replica: (L, E, X) int64.
        cdf: (L, E, X) float32.
    """
    num_experts, none = cdf.shape[1], recorded.shape[1] - 1
    offset = layer * LAYER_STRIDE + rank * RANK_STRIDE
    for t in range(ids.shape[0]):
        turn = ((first_number + t) & MASK32) * GOLDEN + offset
        for k in range(ids.shape[1]):
            e, slot = ids[t, k], -1
            if 0 <= e < num_experts:
                uniform = (((turn + k * CHOICE_STRIDE) & MASK32) >> 8) * 2.0**-24
                replica = 0
                while uniform >= cdf[layer, e, replica]:
                    replica += 1
                slot = slot_of_replica[layer, e, replica]
            slots[t, k] = slot
            if none >= 0:
                recorded[layer, slot if slot >= 0 else none] += 1
