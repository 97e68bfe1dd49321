"""Names for the ranks of a plan from nothing, so that it costs the fewest moves against the placement in force."""

from __future__ import annotations

import numpy as np

from equipoise.jit.compile import inlined, int_zeros, kernel

MAX_RANKS_MATCHED = 64  # beyond, an optimal matching costs more than it saves
_NEVER = 1e9


def match(cost: np.ndarray) -> np.ndarray:
    """(n,) column of each row of the (n, n) ``cost`` in a cheap perfect matching; optimal up to 64 rows."""
    if len(cost) <= MAX_RANKS_MATCHED:
        from scipy.optimize import linear_sum_assignment  # here: its import takes longer than most plans

        return linear_sum_assignment(cost)[1]
    chosen = np.empty(len(cost), dtype=np.int64)
    # Rows with the best offer first.
    _take_cheapest(np.argsort(cost.min(1), kind="stable"), np.ascontiguousarray(cost), chosen)
    return chosen


def relabel(
    placed: np.ndarray,
    old: np.ndarray,
    num_nodes: int,
    inverse_speed: np.ndarray,
    node_price: float,
    keep_nodes: bool,
    affordable: float,
) -> np.ndarray | None:
    """The layer ``placed`` (P,) with its ranks named by :func:`rank_order`; ranks that are gone keep what they had.

    None where the moves cost more than ``affordable`` under any names.
    """
    num_ranks, live = len(inverse_speed), inverse_speed > 0
    cost = _move_prices(placed, old, num_nodes, inverse_speed, node_price)
    among_live = cost if live.all() else cost[live][:, live]
    if max(among_live.min(1).sum(), among_live.min(0).sum()) > affordable:
        return None
    renamed = placed.reshape(num_ranks, -1)[_rank_order(cost, num_nodes, node_price * len(old), keep_nodes)]
    renamed[~live] = old.reshape(num_ranks, -1)[~live]
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
    cost = _move_prices(placed, old, num_nodes, inverse_speed, node_price)
    return _rank_order(cost, num_nodes, node_price * len(old), keep_nodes)


def _rank_order(cost: np.ndarray, num_nodes: int, most: float, keep_nodes: bool) -> np.ndarray:
    """As :func:`rank_order`, from the prices (G, G) of giving each rank what each other has; ``most``: of all moves."""
    if not keep_nodes:
        return match(cost)
    num_ranks = len(cost)
    source, per_node = np.arange(num_ranks), num_ranks // num_nodes
    blocks = cost.reshape(num_nodes, per_node, num_nodes, per_node).transpose(0, 2, 1, 3)
    alike = (blocks < _NEVER).any(-1).all(-1)
    node_of = match(np.where(alike, np.minimum(blocks, most).sum((2, 3)), _NEVER))
    for node, taken in enumerate(node_of):
        source[node * per_node : (node + 1) * per_node] = taken * per_node + match(blocks[node, taken])
    return source


def _move_prices(
    placed: np.ndarray, old: np.ndarray, num_nodes: int, inverse_speed: np.ndarray, node_price: float
) -> np.ndarray:
    """(G, G): the price of giving a rank, by its old name, what the plan has on another, each expert once."""
    num_ranks = len(inverse_speed)
    rows = np.sort(np.stack([old, placed]).reshape(2, num_ranks, -1).astype(np.int64), axis=2)
    cost = np.empty((num_ranks, num_ranks))
    _price_moves(rows[0], rows[1], num_nodes, node_price, int(rows.max()) + 1, cost)
    cost[inverse_speed[:, None] != inverse_speed] = _NEVER
    return cost


@kernel
def _price_moves(
    old: np.ndarray, wanted: np.ndarray, num_nodes: int, node_price: float, num_experts: int, cost: np.ndarray
) -> None:
    """Fills ``cost`` (G, G): of a rank (row) of ``old`` (G, S) that gets what one (column) of ``wanted`` (G, S) has.

    Both with each rank's experts in ascending order.
    """
    num_ranks, size = old.shape
    per_node = num_ranks // num_nodes
    first, following = int_zeros(num_experts), int_zeros(num_ranks * size)  # slots of each expert, ranks descending
    for e in range(num_experts):
        first[e] = -1
    for rank in range(num_ranks):
        for slot in range(size):
            e = old[rank, slot]
            if slot == 0 or e != old[rank, slot - 1]:
                following[rank * size + slot], first[e] = first[e], rank * size + slot
    near = int_zeros(num_nodes * num_ranks)  # by node and column: moves that stay within the node
    num_wanted = int_zeros(num_ranks)
    for column in range(num_ranks):
        for nth in range(size):
            e, last = wanted[column, nth], -1
            if nth > 0 and e == wanted[column, nth - 1]:
                continue
            num_wanted[column] += 1
            slot = first[e]
            while slot >= 0:
                node = slot // size // per_node
                if node != last:
                    near[node * num_ranks + column] += 1
                slot, last = following[slot], node
    for rank in range(num_ranks):
        for column in range(num_ranks):
            on_node = near[rank // per_node * num_ranks + column]
            cost[rank, column] = on_node + node_price * (num_wanted[column] - on_node)
    for column in range(num_ranks):
        for nth in range(size):
            e = wanted[column, nth]
            slot = first[e] if nth == 0 or e != wanted[column, nth - 1] else -1
            while slot >= 0:
                cost[slot // size, column] -= 1.0
                slot = following[slot]


@kernel
def _take_cheapest(order: np.ndarray, cost: np.ndarray, chosen: np.ndarray) -> None:
    """Fills ``chosen`` (n,): rows, in ``order``, take the cheapest column of ``cost`` (n, n) left, or the first."""
    taken = int_zeros(cost.shape[0])
    for row in order:
        best = -1
        for column in range(cost.shape[0]):
            if taken[column] == 0 and (best < 0 or cost[row, column] < cost[row, best]):
                best = column
        chosen[row], taken[best] = best, 1


def compile_relabelling() -> None:
    """Compiles, or loads from the cache, what naming ranks takes."""
    slots = np.arange(4)
    rank_order(slots, slots, 1, np.ones(2), 1.0, False)
    match(np.zeros((MAX_RANKS_MATCHED + 1, MAX_RANKS_MATCHED + 1)))


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
