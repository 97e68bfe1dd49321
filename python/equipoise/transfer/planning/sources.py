"""Assigns sources to the transfers of one batch of one layer: integer kernels compiled by numba.

Words: a **transfer** is one expert that one rank needs and does not hold. A rank of a node where the expert already
lies is served from inside that node; of a node that lacks it, exactly one rank (the **relay**) is served from another
node and passes the expert on to the others there. So an expert crosses to a node once.

Sources start from chunks: the destinations of an expert, in rank order, split over its holders in contiguous chunks
whose sizes differ by at most one. Then :mod:`~equipoise.transfer.planning.senders` picks the relays and balances the
senders over all experts of the layer.

Everything is integer arithmetic in a fixed order, so any machine computes the same result.
"""

from __future__ import annotations

import numpy as np

from equipoise.jit.compile import helper, inlined, int32_table, int32_zeros, kernel, number
from equipoise.transfer.planning.senders import (
    BEGIN,
    DESTINATION_RANK,
    END,
    EXPERT,
    SOURCE_RANK,
    balance_senders,
    choose_relays,
)


@kernel
def first_slots(slot_map: np.ndarray, num_experts: int, num_ranks: int) -> np.ndarray:
    """Finds the first slot of each rank that holds each expert, -1 where none does: (E, G) int32.

    ``slot_map`` is (P,) int32.
    """
    slots_per_rank = slot_map.size // num_ranks
    first = int32_table(num_experts, num_ranks, number(-1))
    for slot in range(slot_map.size - 1, -1, -1):
        first[slot_map[slot], slot // slots_per_rank] = slot
    return first


def chunk_of(index: int, num_elements: int, num_chunks: int) -> int:
    """The chunk that holds element ``index`` when elements are split contiguously, larger chunks first."""
    size, num_larger = num_elements // num_chunks, num_elements % num_chunks
    in_larger = num_larger * (size + 1)
    if index < in_larger:
        return index // (size + 1)
    return num_larger + (index - in_larger) // size


_chunk_of = helper(chunk_of)


@helper
def _rank_lists(
    slot_map: np.ndarray, first: np.ndarray, but_not: np.ndarray, leave_out: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks that hold each expert in ``slot_map``, ascending, one expert after the other.

    Args:
        slot_map: (P,) int32.
        first: (E, G) int32, its first slots.
        but_not: (E, G) int32, first slots of another map.
        leave_out: whether those that hold it in that other map are left out.

    Returns:
        Where each expert's part starts, (E + 2,) int32 of which the last says nothing, and the ranks, int32.
    """
    num_experts, num_ranks = first.shape
    slots_per_rank = slot_map.shape[0] // num_ranks
    start, listed = int32_zeros(num_experts + 2), int32_zeros(slot_map.shape[0])
    for slot in range(slot_map.shape[0]):
        expert, rank = slot_map[slot], slot // slots_per_rank
        if first[expert, rank] == slot and not (leave_out and but_not[expert, rank] >= 0):
            listed[slot] = 1
            start[expert + 2] += 1
    for expert in range(num_experts):
        start[expert + 2] += start[expert + 1]
    ranks = int32_zeros(start[num_experts + 1])
    for slot in range(slot_map.shape[0]):
        if listed[slot] > 0:
            expert = slot_map[slot]
            ranks[start[expert + 1]] = slot // slots_per_rank
            start[expert + 1] += 1
    return start, ranks


@kernel
def assign_sources(
    old: np.ndarray, new: np.ndarray, held: np.ndarray, wanted: np.ndarray, ranks_per_node: int
) -> np.ndarray:
    """Lists the transfers of a batch with their sources.

    Worked example, 2 nodes x 2 ranks x 2 slots::

        slot               0  1 | 2  3 || 4  5 | 6  7        || between nodes
        old                0  1 | 2  3 || 4  5 | 4  5
        new                0  2 | 0  3 || 1  4 | 1  5

        transfer           0           1           2           3
        expert             0           1           1           2
        destination rank   1           2           3           0
        node of it         0           1           1           0
        holders            (0,)        (0,)        (0,)        (1,)     ranks that may serve it
        where              same node   elsewhere   elsewhere   same node
        bundle             0           2           0           0        two ranks of node 1 lack expert 1
        source, relayed    0, 0        0, 0        2, 1        1, 0     rank 2 is the relay, and serves rank 3

    Args:
        old: (P,) int32, the map before; every expert of ``new`` is in it.
        new: (P,) int32, the map after.
        held: (E, G) int32 from :func:`first_slots` of ``old``.
        wanted: the same of ``new``.
        ranks_per_node: ranks of a node.

    Returns:
        (transfers, 4) int32 with columns expert, source rank, destination rank, relayed (1: the source received the
        expert in this same batch), in ascending order of (expert, destination rank).
    """
    num_experts, num_ranks = held.shape
    leave_out = num_ranks < 0  # False, as a variable: see equipoise.jit.compile.number
    holder_start, holders = _rank_lists(old, held, held, leave_out)
    transfer_start, receivers = _rank_lists(new, wanted, held, not leave_out)
    num_transfers = receivers.shape[0]
    transfers = int32_table(num_transfers, number(4), number(0))
    choice = int32_table(num_transfers, number(2), number(0))
    bundle = int32_zeros(num_transfers)
    for expert in range(num_experts):
        for transfer in range(transfer_start[expert], transfer_start[expert + 1]):
            transfers[transfer, EXPERT] = expert
            transfers[transfer, DESTINATION_RANK] = receivers[transfer]
        _split_over_holders(
            transfers,
            choice,
            bundle,
            holders,
            (transfer_start[expert], transfer_start[expert + 1]),
            (holder_start[expert], holder_start[expert + 1]),
            ranks_per_node,
        )
    load = int32_zeros(num_ranks)
    for transfer in range(num_transfers):
        if choice[transfer, END] - choice[transfer, BEGIN] == 1:  # no choice: known before the relays are picked
            load[holders[choice[transfer, BEGIN]]] += 1
    choose_relays(transfers, choice, bundle, load)
    balance_senders(transfers, choice, holders, load)
    return transfers


@inlined
def _split_over_holders(
    transfers: np.ndarray,
    choice: np.ndarray,
    bundle: np.ndarray,
    holders: np.ndarray,
    of_expert: tuple[int, int],
    held_by: tuple[int, int],
    ranks_per_node: int,
) -> None:
    """Gives the transfers of one expert their first sources, node by node, in contiguous chunks.

    Args:
        transfers: see :func:`assign_sources`; column SOURCE_RANK is written.
        choice: (transfers, 2) int32, written: ``holders[BEGIN:END]`` may serve the transfer.
        bundle: (transfers,) int32, written: where the node holds no copy, at the first transfer of the node, the
            number of its ranks that wait for the expert; 0 elsewhere.
        holders: ranks that hold each expert, ascending; those of this one are ``holders[slice(*held_by)]``.
        of_expert: begin and end of its transfers, which are in ascending order of destination rank.
        ranks_per_node: ranks of a node.
    """
    begin, end = held_by
    inside, transfer, num_bundles = begin, of_expert[0], 0
    while transfer < of_expert[1]:
        node = transfers[transfer, DESTINATION_RANK] // ranks_per_node
        first = transfer
        while transfer < of_expert[1] and transfers[transfer, DESTINATION_RANK] // ranks_per_node == node:
            transfer += 1
        while inside < end and holders[inside] // ranks_per_node < node:
            inside += 1
        inside_end = inside
        while inside_end < end and holders[inside_end] // ranks_per_node == node:
            inside_end += 1
        if inside_end == inside:  # no copy on this node: one transfer crosses to it, choose_relays says which
            bundle[first] = transfer - first
            num_bundles += 1
        for i in range(first, transfer if inside_end > inside else first):
            choice[i, BEGIN], choice[i, END] = inside, inside_end
            chunk = _chunk_of(i - first, transfer - first, inside_end - inside)
            transfers[i, SOURCE_RANK] = holders[inside + chunk]
    nth = 0
    for i in range(of_expert[0], of_expert[1]):
        if bundle[i] > 0:
            choice[i, BEGIN], choice[i, END] = begin, end
            transfers[i, SOURCE_RANK] = holders[begin + _chunk_of(nth, num_bundles, end - begin)]
            nth += 1
