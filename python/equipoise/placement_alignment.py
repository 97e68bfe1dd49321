"""Arranges a new placement so that nothing moves that need not: same balance, fewer bytes.

An algorithm decides which experts share a rank. In which of its slots a rank holds them makes no difference to the
load, and neither does which of a node's ranks takes which set of experts. So before a transfer is planned, each node's
ranks are matched to the new sets for the largest overlap with what they hold (the assignment problem, solved exactly),
and then each expert that stays on its rank stays in its slot.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from scipy.optimize import linear_sum_assignment

from equipoise.expert_location import ExpertLocationMetadata
from equipoise.topology import EpTopology


def align_placement(
    old: ExpertLocationMetadata, new: ExpertLocationMetadata, *, relabel_ranks: bool = True
) -> ExpertLocationMetadata:
    """``new`` with slots permuted for the fewest moves from ``old``.

    Args:
        old: the placement of now.
        new: the placement to reach, of the same shape and topology.
        relabel_ranks: whether whole sets of experts may change places among the ranks of a node; False where the
            algorithm meant a particular rank, as for ranks of different speed.

    Returns:
        A placement with, per node and layer (per rank and layer without relabelling), the same experts together and
        the same dispatch weights on them.

    Raises:
        PlacementError: the placements do not fit together.
    """
    old.diff(new)  # checks shapes and topology
    before = old.physical_to_logical_map.cpu().numpy()
    after = new.physical_to_logical_map.cpu().numpy()
    order = slot_order(before, after, new.topology, relabel_ranks=relabel_ranks)
    weights = new.dispatch_weights.cpu().numpy()
    return ExpertLocationMetadata.from_physical_to_logical(
        np.take_along_axis(after, order, axis=1),
        new.num_logical_experts,
        new.topology,
        dispatch_weights=np.take_along_axis(weights, order, axis=1),
        max_replicas=new.max_replicas,
        device=new.physical_to_logical_map.device,
    )


def slot_order(before: np.ndarray, after: np.ndarray, topology: EpTopology, *, relabel_ranks: bool) -> np.ndarray:
    """(L, P) int64: the slot of ``after`` whose expert each slot takes."""
    rank_order = np.tile(np.arange(topology.num_ranks), (before.shape[0], 1))
    if relabel_ranks and topology.ranks_per_node > 1:
        num_experts = int(max(before.max(), after.max())) + 1
        for layer in range(before.shape[0]):
            for node in range(topology.num_nodes):
                ranks = topology.ranks_of_node(node)
                rank_order[layer, ranks.start : ranks.stop] = ranks.start + _best_labels(
                    _per_rank(before[layer], ranks, topology), _per_rank(after[layer], ranks, topology), num_experts
                )
    return _keep_slots(before, after, rank_order)


def _per_rank(row: np.ndarray, ranks: range, topology: EpTopology) -> np.ndarray:
    size = topology.slots_per_rank
    return row[ranks.start * size : ranks.stop * size].reshape(len(ranks), size)


def _best_labels(before: np.ndarray, after: np.ndarray, num_experts: int) -> np.ndarray:
    """(ranks,): which row of ``after`` each rank takes, for the most experts that stay; ties keep the label."""
    present = np.zeros((2, before.shape[0], num_experts), dtype=np.float64)
    np.put_along_axis(present[0], before, 1, axis=1)
    np.put_along_axis(present[1], after, 1, axis=1)
    overlap = present[0] @ present[1].T
    overlap = overlap * (before.shape[0] + 1) + np.eye(before.shape[0])
    return linear_sum_assignment(overlap, maximize=True)[1]


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
