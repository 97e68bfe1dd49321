"""Arranges a new placement so that nothing moves that need not: same balance, fewer bytes.

An algorithm decides which experts share a rank. In which of its slots a rank holds them makes no difference to the
load, and neither does which rank takes which set of experts, unless the algorithm meant a node or a rank. So before a
transfer is planned, ranks are matched to the new sets for the least that must be sent (assignment problems), and then
each expert that stays on its rank stays in its slot.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import scipy.optimize  # noqa: F401 `match` needs it: imported at start-up, not in the first plan beside a forward pass
from numba import njit

from equipoise.algorithms.relabel import match
from equipoise.expert_location import ExpertLocationMetadata
from equipoise.topology import EpTopology

Relabel = Literal["none", "nodes", "ranks"]
"""Who may change names: nobody; whole nodes, and ranks within a node; or any rank."""

# In halves, as the placement algorithm's default prices: an expert that a rank must receive, and one new to its node.
_RECEIVED, _CROSSED = 2, 3


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
    rank_order = np.tile(np.arange(topology.num_ranks), (before.shape[0], 1))
    if relabel != "none" and before.size:
        num_experts = int(max(before.max(), after.max())) + 1
        for layer, (held, sets) in enumerate(zip(before, after, strict=True)):
            if not np.array_equal(held, sets):
                rank_order[layer] = _rank_order(
                    _on_ranks(held, num_experts, topology), _on_ranks(sets, num_experts, topology), topology, relabel
                )
    return _keep_slots(before, after, rank_order)


def _on_ranks(row: np.ndarray, num_experts: int, topology: EpTopology) -> np.ndarray:
    """(G, E) float32, 1 where the rank holds the expert: as floats, so that matrix products count."""
    present = np.zeros((topology.num_ranks, num_experts), dtype=np.float32)
    np.put_along_axis(present, row.reshape(topology.num_ranks, -1), 1, axis=1)
    return present


def _rank_order(held: np.ndarray, sets: np.ndarray, topology: EpTopology, relabel: Relabel) -> np.ndarray:
    """(G,): which of ``sets`` each rank takes. Of several proposals the cheapest that receives no more than without.

    What crosses to a node is shared by its ranks, which no matching of single ranks sees; hence proposals, and the
    true price of each.
    """
    num_nodes, per_node = topology.num_nodes, topology.ranks_per_node
    on_node = held.reshape(num_nodes, per_node, -1).max(1)
    wanted = sets.sum(1)
    received = wanted - held @ sets.T  # (rank, set)
    crossed = wanted - on_node @ sets.T  # (node, set)

    def within_nodes(node_order: np.ndarray) -> np.ndarray:
        order = np.empty(len(held), dtype=np.int64)
        for node, taken in enumerate(node_order):
            ranks, members = np.arange(per_node) + node * per_node, np.arange(per_node) + taken * per_node
            order[ranks] = members[_match(received[np.ix_(ranks, members)])]
        return order

    def price(order: np.ndarray) -> float:
        arrived = sets[order].reshape(num_nodes, per_node, -1).max(1) * (1 - on_node)
        return _RECEIVED * received[everybody, order].sum() + _CROSSED * arrived.sum()

    everybody = np.arange(len(held))
    wanted_by_node = sets.reshape(num_nodes, per_node, -1).max(1)
    proposals = [everybody, within_nodes(np.arange(num_nodes))]
    if num_nodes > 1:
        proposals.append(within_nodes(_match(wanted_by_node.sum(1) - on_node @ wanted_by_node.T)))
        if relabel == "ranks":
            proposals.append(_match(_RECEIVED * received + _CROSSED * crossed.repeat(per_node, axis=0)))
    most = received[everybody, everybody].sum()
    return min((order for order in proposals if received[everybody, order].sum() <= most), key=price)


def _match(cost: np.ndarray) -> np.ndarray:
    """The column of each row in a cheap perfect matching of whole-numbered costs; ties keep the label."""
    return match(cost * (len(cost) + 1) - np.eye(len(cost), dtype=cost.dtype))


@njit(cache=True)
def _keep_slots(before: np.ndarray, after: np.ndarray, rank_order: np.ndarray) -> np.ndarray:
    """Gives each slot its expert of before where the rank still has it; the others fill up in order."""
    num_layers, num_slots = before.shape
    num_ranks = rank_order.shape[1]
    size = num_slots // num_ranks
    order = np.empty((num_layers, num_slots), np.int64)
    taken = np.empty(size, np.bool_)
    for layer in range(num_layers):
        for rank in range(num_ranks):
            source = rank_order[layer, rank] * size
            target = rank * size
            taken[:] = False
            for slot in range(target, target + size):
                order[layer, slot] = -1
                for i in range(size):
                    if not taken[i] and after[layer, source + i] == before[layer, slot]:
                        order[layer, slot] = source + i
                        taken[i] = True
                        break
            i = 0
            for slot in range(target, target + size):
                if order[layer, slot] < 0:
                    while taken[i]:
                        i += 1
                    order[layer, slot] = source + i
                    taken[i] = True
    return order
