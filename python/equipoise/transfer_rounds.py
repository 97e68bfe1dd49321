"""Orders transfers in rounds in which a rank sends to at most one peer and receives from at most one.

Senders and receivers are the two sides of a bipartite multigraph, transfers its edges, rounds its colours. König's
theorem (1916) gives as many rounds as the busiest rank has transfers one way; the proof's alternating paths are the
algorithm. Transfers from ranks that held the expert come first; those from relays, which must have received it
before, follow in rounds of their own.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from equipoise.transfer_sources import DESTINATION_RANK, RELAYED, SOURCE_RANK


@njit(cache=True)
def max_degree(sources: np.ndarray, destinations: np.ndarray, num_ranks: int) -> int:
    """Most transfers that one rank sends, or receives: the least number of rounds."""
    count = np.zeros((2, num_ranks), np.int32)
    most = 0
    for edge in range(sources.size):
        count[0, sources[edge]] += 1
        count[1, destinations[edge]] += 1
        most = max(most, count[0, sources[edge]], count[1, destinations[edge]])
    return most


@njit(cache=True)
def color_edges(sources: np.ndarray, destinations: np.ndarray, num_ranks: int) -> np.ndarray:
    """A round for each transfer, (edges,) int32 in [0, max_degree): none holds two with one source or destination."""
    num_edges = sources.size
    colors = np.full(num_edges, -1, np.int32)
    if num_edges == 0:
        return colors
    num_colors = max_degree(sources, destinations, num_ranks)
    # edge_at[0, rank, color]: what the rank sends in that round; edge_at[1, ...]: what it receives
    edge_at = np.full((2, num_ranks, num_colors), -1, np.int32)
    for edge in range(num_edges):
        source, destination = sources[edge], destinations[edge]
        free_to_send, free_to_receive, common = -1, -1, -1
        for color in range(num_colors):
            sends = edge_at[0, source, color] < 0
            receives = edge_at[1, destination, color] < 0
            if sends and receives:
                common = color
                break
            if sends and free_to_send < 0:
                free_to_send = color
            if receives and free_to_receive < 0:
                free_to_receive = color
        if common < 0:
            # Make free_to_send free at the destination: swap the two colours along the path that starts there. It
            # cannot end at the source, which it could enter only by an edge of the colour that the source lacks.
            _swap_path(edge_at, colors, sources, destinations, destination, free_to_send, free_to_receive)
            common = free_to_send
        colors[edge] = common
        edge_at[0, source, common] = edge
        edge_at[1, destination, common] = edge
    return colors


@njit(cache=True)
def _swap_path(
    edge_at: np.ndarray,
    colors: np.ndarray,
    sources: np.ndarray,
    destinations: np.ndarray,
    start: int,
    color: int,
    other: int,
) -> None:
    """Exchanges ``color`` and ``other`` on the alternating path that leaves receiver ``start`` by ``color``."""
    side, rank, wanted, fresh = 1, start, color, other
    edge = edge_at[side, rank, wanted]
    edge_at[side, rank, wanted] = -1
    while edge >= 0:
        far_side = 1 - side
        far_rank = sources[edge] if far_side == 0 else destinations[edge]
        following = edge_at[far_side, far_rank, fresh]  # has the colour that this edge takes: next to change
        colors[edge] = fresh
        edge_at[side, rank, fresh] = edge
        edge_at[far_side, far_rank, fresh] = edge
        if following < 0:
            edge_at[far_side, far_rank, wanted] = -1
        # `following` gives up `fresh` at far_rank and takes `wanted`, the place that `edge` has left
        side, rank, edge = far_side, far_rank, following
        wanted, fresh = fresh, wanted


@njit(cache=True)
def assign_rounds(jobs: np.ndarray, num_ranks: int) -> np.ndarray:
    """(jobs,) int32: transfers from holders in rounds 0 .. A-1, transfers from relays in A .. A+B-1."""
    num_jobs = jobs.shape[0]
    rounds = np.empty(num_jobs, np.int32)
    edges = np.empty(num_jobs, np.int32)
    sources = np.empty(num_jobs, np.int32)
    destinations = np.empty(num_jobs, np.int32)
    base = 0
    for relayed in range(2):
        size = 0
        for job in range(num_jobs):
            if jobs[job, RELAYED] == relayed:
                edges[size] = job
                sources[size] = jobs[job, SOURCE_RANK]
                destinations[size] = jobs[job, DESTINATION_RANK]
                size += 1
        if size > 0:
            colors = color_edges(sources[:size], destinations[:size], num_ranks)
            for i in range(size):
                rounds[edges[i]] = colors[i] + base
            base += max_degree(sources[:size], destinations[:size], num_ranks)
    return rounds
