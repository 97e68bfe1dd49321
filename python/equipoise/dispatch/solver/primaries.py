"""Chooses the replica of each expert that decoding opens first, so that no rank gets more of them than it must.

All ranks open the same choices without a message, which is what keeps the number of activated experts low. The choice
is an optimal semi-matching of experts and ranks (Harvey, Ladner, Lovasz, Tamir, 2003): as long as a chain of experts,
each of which can go to the next one's rank, leads from a rank to one with at least two fewer, all of the chain move on.
Where no chain is left, the largest number on any rank is the least possible.
"""

from __future__ import annotations

import numpy as np

from equipoise.jit.compile import helper, int_zeros
from equipoise.jit.sort import descending


@helper
def choose_primaries(
    rank_of_single: np.ndarray,
    num_choices: np.ndarray,
    num_ranks: int,
    slot: np.ndarray,
    rank: np.ndarray,
    weight: np.ndarray,
) -> None:
    """Puts the choice that is opened first into column 0 of ``slot``, ``rank`` and ``weight`` (M, C), in place.

    Args:
        rank_of_single: (E,) rank of an expert that is on one alone, -1 of others.
        num_choices: (rows,) of each row.
    """
    held = int_zeros(num_ranks)
    for e in range(rank_of_single.shape[0]):
        if rank_of_single[e] >= 0:
            held[rank_of_single[e]] += 1
    for m in descending(-num_choices.astype(np.float64)):  # a good start: those with the fewest choices first
        best = 0
        for j in range(1, num_choices[m]):
            if held[rank[m, j]] < held[rank[m, best]]:
                best = j
        held[rank[m, best]] += 1
        _make_first(m, best, slot, rank, weight)
    first, following = int_zeros(num_ranks), int_zeros(num_choices.shape[0])
    queue, row_into, choice_into = int_zeros(num_ranks), int_zeros(num_ranks), int_zeros(num_ranks)
    settled = int_zeros(num_ranks)
    _list_rows(rank, first, following)
    moved = True
    while moved:
        moved = False
        settled[:] = 0
        for start in descending(held.astype(np.float64)):
            if held[start] <= settled[start]:
                continue  # within the reach of one with as many that found no end
            end = _end_of_chain(start, held, num_choices, rank, first, following, queue, row_into, choice_into)
            if end < 0:
                for r in range(num_ranks):
                    if r == start or row_into[r] >= 0:
                        settled[r] = max(settled[r], held[start])
                continue
            moved = True
            held[start] -= 1
            held[end] += 1
            while end != start:
                m, j = row_into[end], choice_into[end]
                end = rank[m, 0]
                _make_first(m, j, slot, rank, weight)
            _list_rows(rank, first, following)


@helper
def _make_first(m: int, j: int, slot: np.ndarray, rank: np.ndarray, weight: np.ndarray) -> None:
    for table in (slot, rank, weight):
        table[m, 0], table[m, j] = table[m, j], table[m, 0]


@helper
def _list_rows(rank: np.ndarray, first: np.ndarray, following: np.ndarray) -> None:
    """Fills lists of the rows whose first choice is on a rank: ``first`` (G,), the ``following`` (rows,) of each."""
    for r in range(first.shape[0]):
        first[r] = -1
    for m in range(following.shape[0] - 1, -1, -1):
        following[m] = first[rank[m, 0]]
        first[rank[m, 0]] = m


@helper
def _end_of_chain(
    start: int,
    held: np.ndarray,
    num_choices: np.ndarray,
    rank: np.ndarray,
    first: np.ndarray,
    following: np.ndarray,
    queue: np.ndarray,
    row_into: np.ndarray,
    choice_into: np.ndarray,
) -> int:
    """The nearest rank that a chain leads to and that has at least two fewer than ``start``; -1: none.

    ``row_into`` and ``choice_into`` (G,) become the row that moves to a rank of the chain, and its choice there.
    """
    for r in range(row_into.shape[0]):
        row_into[r] = -1
    queue[0] = start
    head, tail = 0, 1
    while head < tail:
        m = first[queue[head]]
        head += 1
        while m >= 0:
            for j in range(1, num_choices[m]):
                r = rank[m, j]
                if r == start or row_into[r] >= 0:
                    continue
                row_into[r], choice_into[r] = m, j
                if held[r] <= held[start] - 2:
                    return r
                queue[tail] = r
                tail += 1
            m = following[m]
    return -1
