"""Names for the ranks of a plan from nothing, so that it costs the fewest moves against the placement in force."""

from __future__ import annotations

import numpy as np

from equipoise.jit.compile import inlined

MAX_RANKS_MATCHED = 64  # beyond, an optimal matching costs more than it saves
_NEVER = 1e9


def match(cost: np.ndarray) -> np.ndarray:
    """(n,) column of each row of the (n, n) ``cost`` in a cheap perfect matching; optimal up to 64 rows."""
    if len(cost) <= MAX_RANKS_MATCHED:
        from scipy.optimize import linear_sum_assignment  # here: its import takes longer than most plans

        return linear_sum_assignment(cost)[1]
    chosen = np.empty(len(cost), dtype=np.int64)
    free = cost.copy()
    for row in np.argsort(cost.min(1), kind="stable"):  # rows with the best offer first
        chosen[row] = free[row].argmin()
        free[:, chosen[row]] = np.inf
    return chosen


def relabel(
    placed: np.ndarray, old: np.ndarray, num_nodes: int, inverse_speed: np.ndarray, node_price: float, keep_nodes: bool
) -> np.ndarray:
    """The layer ``placed`` (P,) with its ranks named by :func:`rank_order`; ranks that are gone keep what they had."""
    num_ranks = len(inverse_speed)
    renamed = placed.reshape(num_ranks, -1)[rank_order(placed, old, num_nodes, inverse_speed, node_price, keep_nodes)]
    renamed[inverse_speed == 0] = old.reshape(num_ranks, -1)[inverse_speed == 0]
    return renamed.ravel()


def rank_order(
    placed: np.ndarray, old: np.ndarray, num_nodes: int, inverse_speed: np.ndarray, node_price: float, keep_nodes: bool
) -> np.ndarray:
    """(G,): the rank of the layer ``placed`` (P,) that each takes over, for the least price of moves from ``old`` (P,).

    Args:
        inverse_speed: (G,) 1 / speed; only ranks of equal speed trade names.
        node_price: price of a move whose weights come from another node; within a node it is 1.
        keep_nodes: ranks that share a node still share one: nodes are permuted as wholes, then the ranks in each.
    """
    num_ranks = len(inverse_speed)
    rank_of_slot = np.repeat(np.arange(num_ranks), len(old) // num_ranks)
    on_rank = np.zeros((num_ranks, max(old.max(), placed.max()) + 1), dtype=bool)
    on_rank[rank_of_slot, old] = True
    on_node = on_rank.reshape(num_nodes, -1, on_rank.shape[1]).any(1).repeat(num_ranks // num_nodes, axis=0)
    price = np.where(on_rank, 0.0, np.where(on_node, 1.0, node_price))
    # (old name, new name): of giving a rank what the plan has on another, each expert once, whatever slots it takes.
    wanted = np.sort(placed.reshape(num_ranks, -1), axis=1)
    cost = price[:, wanted[:, 0]]
    for slot in range(1, wanted.shape[1]):
        cost += np.where(wanted[:, slot] != wanted[:, slot - 1], price[:, wanted[:, slot]], 0.0)
    cost[inverse_speed[:, None] != inverse_speed] = _NEVER
    source = np.arange(num_ranks)
    if keep_nodes:
        per_node = num_ranks // num_nodes
        blocks = cost.reshape(num_nodes, per_node, num_nodes, per_node).transpose(0, 2, 1, 3)
        alike = (blocks < _NEVER).any(-1).all(-1)
        node_of = match(np.where(alike, np.minimum(blocks, node_price * len(old)).sum((2, 3)), _NEVER))
        for node, taken in enumerate(node_of):
            source[node * per_node : (node + 1) * per_node] = taken * per_node + match(blocks[node, taken])
    else:
        source = match(cost)
    return source


@inlined
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
