"""Arranges a new placement so that nothing moves that need not: same balance, fewer bytes.

An algorithm decides which experts share a rank. In which of its slots a rank holds them makes no difference to the
load, and neither does which rank takes which set of experts, unless the algorithm meant a node or a rank. So before a
transfer is planned, ranks are matched to the new sets for the least that must be sent (assignment problems), and then
each expert that stays on its rank stays in its slot.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import scipy.optimize  # noqa: F401 rank_order needs it: imported at start-up, not beside a forward pass

from equipoise.jit.compile import int_zeros, kernel
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.placement.relabel import rank_order
from equipoise.topology import EpTopology

Relabel = Literal["none", "nodes", "ranks"]
"""Who may change names: nobody; whole nodes, and ranks within a node; or any rank."""

_NODE_PRICE = 2.5
"""Of an expert new to its node, where any other that a rank must receive costs 1: as in the placement search."""


def align_placement(
    old: ExpertLocationMetadata, new: ExpertLocationMetadata, *, relabel: Relabel = "nodes"
) -> ExpertLocationMetadata:
    """``new`` with slots permuted for the fewest moves from ``old``; never more moves than without.

    Args:
        old: the placement of now.
        new: the placement to reach, of the same shape and topology.
        relabel: "ranks" where the algorithm cares only about which experts share a rank; "nodes" where it also chose
            which ranks share a node, as for group-limited routing; "none" where it meant a particular rank, as for
            ranks of different speed.

    Returns:
        A placement with the same sets of experts, each with the same dispatch weights, under other names.

    Raises:
        PlacementError: the placements do not fit together.
    """
    old.diff(new)  # checks shapes and topology
    before = old.physical_to_logical_map.cpu().numpy()
    after = new.physical_to_logical_map.cpu().numpy()
    order = slot_order(before, after, new.topology, relabel=relabel)
    weights = new.dispatch_weights.cpu().numpy()
    return ExpertLocationMetadata.from_physical_to_logical(
        np.take_along_axis(after, order, axis=1),
        new.num_logical_experts,
        new.topology,
        dispatch_weights=np.take_along_axis(weights, order, axis=1),
        max_replicas=new.max_replicas,
        device=new.physical_to_logical_map.device,
    )


def slot_order(before: np.ndarray, after: np.ndarray, topology: EpTopology, *, relabel: Relabel) -> np.ndarray:
    """(L, P) int64: the slot of ``after`` whose expert each slot takes; arguments (L, P), as in align_placement."""
    orders = np.tile(np.arange(topology.num_ranks), (before.shape[0], 1))
    if relabel != "none" and before.size:
        num_experts = int(max(before.max(), after.max())) + 1
        for layer, (held, sets) in enumerate(zip(before, after, strict=True)):
            if not np.array_equal(held, sets):
                orders[layer] = _best_rank_order(held, sets, num_experts, topology, relabel)
    return _keep_slots(before, after, orders)


def _best_rank_order(
    before: np.ndarray, after: np.ndarray, num_experts: int, topology: EpTopology, relabel: Relabel
) -> np.ndarray:
    """(G,): which rank of ``after`` each takes over. Of several proposals the cheapest that receives no more than none.

    What crosses to a node is shared by its ranks, which no matching of single ranks sees; hence proposals, and the
    true price of each.
    """
    num_ranks, num_nodes = topology.num_ranks, topology.num_nodes
    held, sets = (_presence(row.reshape(num_ranks, -1), num_experts) for row in (before, after))
    on_node = held.reshape(num_nodes, -1, num_experts).any(1)
    alike = np.ones(num_ranks)

    def received(order: np.ndarray) -> int:
        return int((sets[order] & ~held).sum())

    def price(order: np.ndarray) -> float:
        crossed = (sets[order].reshape(num_nodes, -1, num_experts).any(1) & ~on_node).sum()
        return received(order) + (_NODE_PRICE - 1) * crossed

    unnamed = np.arange(num_ranks)
    within = [
        node * topology.ranks_per_node + rank_order(new, old, 1, alike[: topology.ranks_per_node], _NODE_PRICE, True)
        for node, (new, old) in enumerate(zip(np.split(after, num_nodes), np.split(before, num_nodes), strict=True))
    ]
    proposals = [unnamed, np.concatenate(within)]
    if num_nodes > 1:
        proposals.append(rank_order(after, before, num_nodes, alike, _NODE_PRICE, True))
        if relabel == "ranks":
            proposals.append(rank_order(after, before, num_nodes, alike, _NODE_PRICE, False))
    most = received(unnamed)
    return min((order for order in proposals if received(order) <= most), key=price)


def _presence(experts: np.ndarray, num_experts: int) -> np.ndarray:
    """(places, E) bool: whether each place, a row of ``experts``, holds each expert."""
    present = np.zeros((len(experts), num_experts), dtype=bool)
    np.put_along_axis(present, experts, True, axis=1)
    return present


@kernel
def _keep_slots(before: np.ndarray, after: np.ndarray, rank_order: np.ndarray) -> np.ndarray:
    """Gives each slot its expert of before where the rank still has it; the others fill up in order."""
    num_layers, num_slots = before.shape
    num_ranks = rank_order.shape[1]
    size = num_slots // num_ranks
    order, taken = np.empty((num_layers, num_slots), np.int64), int_zeros(size)
    for layer in range(num_layers):
        for rank in range(num_ranks):
            source = rank_order[layer, rank] * size
            target = rank * size
            for i in range(size):
                taken[i] = 0
            for slot in range(target, target + size):
                order[layer, slot] = -1
                for i in range(size):
                    if taken[i] == 0 and after[layer, source + i] == before[layer, slot]:
                        order[layer, slot] = source + i
                        taken[i] = 1
                        break
            i = 0
            for slot in range(target, target + size):
                if order[layer, slot] < 0:
                    while taken[i] > 0:
                        i += 1
                    order[layer, slot] = source + i
                    taken[i] = 1
    return order
