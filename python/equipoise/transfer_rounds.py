"""Orders transfers in rounds in which a rank sends to at most one peer and receives from at most one.

Senders and receivers are the two sides of a bipartite multigraph, transfers its edges, rounds its colours. König's
theorem (1916) gives as many rounds as the busiest rank has transfers one way; the proof's alternating paths are the
algorithm. That holds for transfers from ranks that held the expert; those from relays, which must have received it
before, fill the gaps behind its arrival.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from equipoise.transfer_sources import DESTINATION_RANK, EXPERT, RELAYED, SOURCE_RANK


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
    """(jobs,) int32: the round of each transfer.

    Transfers from holders take A rounds, the least possible. Rounds that bring experts to relays go first, and each
    transfer from a relay takes the first later round in which both ranks' links are free. Should that need more rounds
    than A + B, B being the least for the relays' transfers alone, those are put in B rounds of their own instead.
    """
    num_jobs = jobs.shape[0]
    num_relayed = jobs[:, RELAYED].sum()
    is_relayed = np.zeros(num_jobs, np.bool_)
    for job in range(num_jobs):
        is_relayed[job] = jobs[job, RELAYED] == 1
    rounds = np.full(num_jobs, -1, np.int32)
    num_held = _color_part(jobs, is_relayed, False, num_ranks, rounds)
    if num_relayed == 0:
        return rounds
    fed_by = _relays_first(jobs, rounds, num_held)
    if _fill_in_relayed(jobs, rounds, fed_by, num_ranks) > num_held + _degree_of_part(jobs, is_relayed, num_ranks):
        _color_part(jobs, is_relayed, True, num_ranks, rounds)
        for job in range(num_jobs):
            if is_relayed[job]:
                rounds[job] += num_held
    return rounds


@njit(cache=True)
def _degree_of_part(jobs: np.ndarray, chosen: np.ndarray, num_ranks: int) -> int:
    part = np.flatnonzero(chosen)
    sources = np.empty(part.size, np.int32)
    destinations = np.empty(part.size, np.int32)
    for i in range(part.size):
        sources[i], destinations[i] = jobs[part[i], SOURCE_RANK], jobs[part[i], DESTINATION_RANK]
    return max_degree(sources, destinations, num_ranks)


@njit(cache=True)
def _color_part(jobs: np.ndarray, is_relayed: np.ndarray, part: bool, num_ranks: int, rounds: np.ndarray) -> int:
    """Colours the jobs whose ``is_relayed`` equals ``part``; returns the number of colours."""
    edges = np.flatnonzero(is_relayed == part)
    sources = np.empty(edges.size, np.int32)
    destinations = np.empty(edges.size, np.int32)
    for i in range(edges.size):
        sources[i], destinations[i] = jobs[edges[i], SOURCE_RANK], jobs[edges[i], DESTINATION_RANK]
    colors = color_edges(sources, destinations, num_ranks)
    for i in range(edges.size):
        rounds[edges[i]] = colors[i]
    return max_degree(sources, destinations, num_ranks)


@njit(cache=True)
def _relays_first(jobs: np.ndarray, rounds: np.ndarray, num_rounds: int) -> np.ndarray:
    """Reorders the rounds of the holders' transfers, those that feed most relays first.

    Returns:
        (jobs,) int32: for each transfer from a relay the transfer that feeds it, -1 for the others.
    """
    num_jobs = jobs.shape[0]
    fed_by = np.full(num_jobs, -1, np.int32)
    worth = np.zeros(num_rounds, np.int32)
    first = 0  # of the jobs of the same expert, which lie together
    for job in range(num_jobs):
        if jobs[job, EXPERT] != jobs[first, EXPERT]:
            first = job
        if jobs[job, RELAYED] == 0:
            continue
        feeder = first
        while jobs[feeder, RELAYED] == 1 or jobs[feeder, DESTINATION_RANK] != jobs[job, SOURCE_RANK]:
            feeder += 1
        fed_by[job] = feeder
        worth[rounds[feeder]] += 1
    order = np.argsort(-worth, kind="mergesort")
    place = np.empty(num_rounds, np.int32)
    for i in range(num_rounds):
        place[order[i]] = i
    for job in range(num_jobs):
        if jobs[job, RELAYED] == 0:
            rounds[job] = place[rounds[job]]
    return fed_by


@njit(cache=True)
def _fill_in_relayed(jobs: np.ndarray, rounds: np.ndarray, fed_by: np.ndarray, num_ranks: int) -> int:
    """Gives each transfer from a relay the first round after its expert's arrival; returns the number of rounds."""
    num_jobs = jobs.shape[0]
    busy = np.zeros((2, num_ranks, 2 * num_jobs + 1), np.bool_)  # sends, receives
    most, latest = 0, 0
    for job in range(num_jobs):
        if fed_by[job] < 0:
            busy[0, jobs[job, SOURCE_RANK], rounds[job]] = True
            busy[1, jobs[job, DESTINATION_RANK], rounds[job]] = True
            most = max(most, rounds[job] + 1)
            latest = max(latest, rounds[job])
    for arrival in range(latest + 1):  # what arrives first is passed on first
        for job in range(num_jobs):
            if fed_by[job] < 0 or rounds[fed_by[job]] != arrival:
                continue
            source, destination = jobs[job, SOURCE_RANK], jobs[job, DESTINATION_RANK]
            at = arrival + 1
            while busy[0, source, at] or busy[1, destination, at]:
                at += 1
            busy[0, source, at] = busy[1, destination, at] = True
            rounds[job] = at
            most = max(most, at + 1)
    return most
