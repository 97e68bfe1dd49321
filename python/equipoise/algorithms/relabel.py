"""Names for the ranks of a plan from nothing, so that it costs the fewest moves against the placement in force."""

from __future__ import annotations

import numpy as np

from equipoise.algorithms.kernel import helper
from equipoise.algorithms.order import descending

MOST_RANKS_MATCHED = 64  # beyond, an optimal matching costs more than it saves


@helper
def match(cost: np.ndarray) -> np.ndarray:
    """(n,) column of each row of the (n, n) ``cost`` in a cheap perfect matching; optimal up to 64 rows."""
    return _hungarian(cost) if cost.shape[0] <= MOST_RANKS_MATCHED else _greedy(cost)


@helper
def _greedy(cost: np.ndarray) -> np.ndarray:
    """Rows in order of how clear their best choice is; each takes the cheapest free column."""
    size = cost.shape[0]
    least = np.empty(size)
    for row in range(size):
        least[row] = -np.inf
        for column in range(size):
            least[row] = max(least[row], -cost[row, column])
    column_of, used = np.empty(size, dtype=np.int64), np.zeros(size, dtype=np.bool_)
    for row in descending(least):
        best = -1
        for column in range(size):
            if not used[column] and (best < 0 or cost[row, column] < cost[row, best]):
                best = column
        used[best] = True
        column_of[row] = best
    return column_of


@helper
def _hungarian(cost: np.ndarray) -> np.ndarray:
    """Least-cost perfect matching by shortest augmenting paths (Kuhn-Munkres with potentials), O(n^3)."""
    size = cost.shape[0]
    row_price, column_price = np.zeros(size + 1), np.zeros(size + 1)
    row_of, previous = np.zeros(size + 1, dtype=np.int64), np.zeros(size + 1, dtype=np.int64)  # 1-based, 0: none
    for row in range(1, size + 1):
        row_of[0] = row
        column = 0
        slack, used = np.empty(size + 1), np.zeros(size + 1, dtype=np.bool_)
        for j in range(size + 1):
            slack[j] = np.inf
        while row_of[column] != 0:
            used[column] = True
            here, delta, following = row_of[column], np.inf, 0
            for j in range(1, size + 1):
                if used[j]:
                    continue
                reduced = cost[here - 1, j - 1] - row_price[here] - column_price[j]
                if reduced < slack[j]:
                    slack[j], previous[j] = reduced, column
                if slack[j] < delta:
                    delta, following = slack[j], j
            for j in range(size + 1):
                if used[j]:
                    row_price[row_of[j]] += delta
                    column_price[j] -= delta
                else:
                    slack[j] -= delta
            column = following
        while column != 0:
            row_of[column] = row_of[previous[column]]
            column = previous[column]
    column_of = np.empty(size, dtype=np.int64)
    for column in range(1, size + 1):
        column_of[row_of[column] - 1] = column - 1
    return column_of


@helper
def relabel(
    expert: np.ndarray, where: np.ndarray, prices: np.ndarray, slowness: np.ndarray, ranks_per_domain: int
) -> np.ndarray:
    """The plan ``expert`` (P,) with its ranks permuted for the least price of moves.

    Domains (nodes that experts may not leave) are permuted as wholes first, then the ranks inside each. Only ranks of
    equal speed trade names.
    """
    num_ranks = where.shape[0]
    size, num_domains = expert.shape[0] // num_ranks, num_ranks // ranks_per_domain
    price = np.zeros((num_ranks, num_ranks))  # of giving rank i what the plan has on rank j
    for i in range(num_ranks):
        for j in range(num_ranks):
            if slowness[i] != slowness[j]:
                price[i, j] = 1e9
                continue
            for slot in range(j * size, (j + 1) * size):
                price[i, j] += prices[where[i, expert[slot]]]
    old_domain = np.zeros((num_domains, num_domains))
    for i in range(num_ranks):
        for j in range(num_ranks):
            offset_i, offset_j = i % ranks_per_domain, j % ranks_per_domain
            alike = price[i, j] if price[i, j] < 1e9 or offset_i == offset_j else 0.0
            old_domain[i // ranks_per_domain, j // ranks_per_domain] += alike
    domain_of = match(old_domain)
    out = expert.copy()
    for domain in range(num_domains):
        first, source = domain * ranks_per_domain, domain_of[domain] * ranks_per_domain
        block = np.empty((ranks_per_domain, ranks_per_domain))
        for i in range(ranks_per_domain):
            for j in range(ranks_per_domain):
                block[i, j] = price[first + i, source + j]
        rank_of = match(block)
        for i in range(ranks_per_domain):
            if slowness[first + i] == 0.0:
                continue
            for k in range(size):
                out[(first + i) * size + k] = expert[(source + rank_of[i]) * size + k]
    return out


@helper
def align(expert: np.ndarray, share: np.ndarray, old: np.ndarray, slots_per_rank: int) -> None:
    """Reorders the slots inside each rank, in place, so that an expert that stays on a rank stays in its slot."""
    for first in range(0, expert.shape[0], slots_per_rank):
        last = first + slots_per_rank
        for slot in range(first, last):
            if expert[slot] == old[slot]:
                continue
            for other in range(first, last):
                if expert[other] == old[slot] and expert[other] != old[other]:
                    expert[slot], expert[other] = expert[other], expert[slot]
                    share[slot], share[other] = share[other], share[slot]
                    break
