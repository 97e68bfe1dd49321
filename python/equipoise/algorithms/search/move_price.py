"""Prices the moves of a placement by where each expert was before."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from equipoise.jit.compile import helper

ON_RANK, ON_NODE, ELSEWHERE = 0, 1, 2  # origin of an expert that a slot receives; a price for each


class MoveTerms(NamedTuple):
    """What moves cost, and how many a layer may make."""

    prices: np.ndarray  # (3,) float64 by origin: ON_RANK, ON_NODE, ELSEWHERE
    slot_price: float  # balance that a move of price 1 has to gain
    max_moves: int  # slots of a layer that may receive another expert


@helper
def origins_of(expert: np.ndarray, num_experts: int, num_ranks: int, ranks_per_node: int) -> np.ndarray:
    """(G, E) uint8: whether each rank holds an expert already, or at least its node does."""
    size = expert.shape[0] // num_ranks
    origin = np.empty((num_ranks, num_experts), dtype=np.uint8)
    for rank in range(num_ranks):
        for e in range(num_experts):
            origin[rank, e] = ELSEWHERE
    for slot in range(expert.shape[0]):
        node = slot // size // ranks_per_node
        for rank in range(node * ranks_per_node, (node + 1) * ranks_per_node):
            if origin[rank, expert[slot]] == ELSEWHERE:
                origin[rank, expert[slot]] = ON_NODE
        origin[slot // size, expert[slot]] = ON_RANK
    return origin


@helper
def spent(expert: np.ndarray, origin: np.ndarray, prices: np.ndarray) -> tuple[float, int]:
    """Price and number of the moves that lead to the present placement."""
    size = expert.shape[0] // origin.shape[0]
    total, moves = 0.0, 0
    for slot in range(expert.shape[0]):
        source = origin[slot // size, expert[slot]]
        total += prices[source]
        if source != ON_RANK:
            moves += 1
    return total, moves
