"""What a placement's moves cost, by where each expert was before."""

from __future__ import annotations

import numpy as np

from equipoise.jit.compile import helper

ON_RANK, ON_NODE, ELSEWHERE = 0, 1, 2  # where an expert was; a price for each


@helper
def origin(expert: np.ndarray, num_experts: int, num_ranks: int, ranks_per_node: int) -> np.ndarray:
    """(G, E) uint8: whether each rank holds an expert already, or at least its node does."""
    size = expert.shape[0] // num_ranks
    where = np.empty((num_ranks, num_experts), dtype=np.uint8)
    for rank in range(num_ranks):
        for e in range(num_experts):
            where[rank, e] = ELSEWHERE
    for slot in range(expert.shape[0]):
        node = slot // size // ranks_per_node
        for rank in range(node * ranks_per_node, (node + 1) * ranks_per_node):
            if where[rank, expert[slot]] == ELSEWHERE:
                where[rank, expert[slot]] = ON_NODE
        where[slot // size, expert[slot]] = ON_RANK
    return where


@helper
def spent(expert: np.ndarray, where: np.ndarray, prices: np.ndarray) -> tuple[float, int]:
    """Price and number of the moves that lead to the present placement."""
    size = expert.shape[0] // where.shape[0]
    total, moves = 0.0, 0
    for slot in range(expert.shape[0]):
        place = where[slot // size, expert[slot]]
        total += prices[place]
        if place != ON_RANK:
            moves += 1
    return total, moves
