"""Splits a change of placement into batches in which no rank receives more experts than it may stage.

After every batch the layer is a complete placement again, so it can commit and serve. What makes that possible with a
single staging slot per rank:

An expert must arrive at a rank; the arrival needs a **free slot**, one whose content may go. Content may go when the
rank is not to keep it and another copy remains: on the node, if the node is to keep the expert (so that no expert
crosses to a node twice), else anywhere. Otherwise the copy is **critical**, and waits for an arrival of the same expert
elsewhere. Arrivals that find a free slot are taken first. When no rank with an arrival to come has one left, every
arrival releases exactly one critical copy and every rank has as many critical copies as arrivals: the graph "an arrival
here releases a slot there" is Eulerian, so it has a simple cycle, and all arrivals of a cycle can happen in one commit
with one expert per rank. Slots that hold an expert of their rank in the wrong place are put right by copies inside the
rank.
"""

from __future__ import annotations

import numpy as np

from equipoise.jit.compile import helper, inlined, int32_empty_table, int32_zeros, kernel, number
from equipoise.transfer.planning.cycles import take_cycles
from equipoise.transfer.planning.layer_in_motion import (
    LayerInMotion,
    arrive,
    begin_motion,
    free_slot,
    max_of,
    released_rank,
)


@kernel
def split_into_batches(
    old: np.ndarray,
    new: np.ndarray,
    num_experts: int,
    num_ranks: int,
    ranks_per_node: int,
    capacity: int,
    alive: np.ndarray,
) -> np.ndarray:
    """The placements after each batch.

    Args:
        old: (P,) int32.
        new: (P,) int32.
        num_experts: ``E``; each has a slot in both maps.
        num_ranks: ``G``.
        ranks_per_node: ranks of a node.
        capacity: most experts that a rank may receive in a batch, at least 1.
        alive: (G,) int32, 1 for ranks that take part.

    Returns:
        (batches, P) int32; the last row is ``new``. One row if every rank receives at most ``capacity`` experts.
    """
    layer = begin_motion(old, new, num_experts, ranks_per_node, alive)
    arrivals = 0
    for rank in range(num_ranks):
        arrivals += layer.pending[rank]
    maps = int32_empty_table(arrivals + 1, old.shape[0])
    held = int32_empty_table(num_experts, num_ranks)  # copies when the batch began
    num_batches = 0
    while max_of(layer.pending) > capacity:
        for rank in range(num_ranks):
            layer.budget[rank] = capacity
        for expert in range(num_experts):
            for rank in range(num_ranks):
                held[expert, rank] = layer.copies[expert, rank]
        _take_arrivals_with_a_free_slot(layer, held, capacity, ranks_per_node)
        take_cycles(layer, ranks_per_node)
        used = False
        for slot in range(old.shape[0]):
            maps[num_batches, slot] = layer.now[slot]
        for rank in range(num_ranks):
            used = used or layer.budget[rank] < capacity
        assert used  # the batch does something: see the module
        num_batches += 1
    result = int32_empty_table(num_batches + 1, old.shape[0])  # the maps alone, without the room that was left
    for slot in range(old.shape[0]):
        for batch in range(num_batches):
            result[batch, slot] = maps[batch, slot]
        result[num_batches, slot] = new[slot]
    return result


@inlined
def _take_arrivals_with_a_free_slot(layer: LayerInMotion, held: np.ndarray, capacity: int, ranks_per_node: int) -> None:
    """Rank after rank, one arrival at a time, until no rank with budget has both an arrival to come and a free slot.

    Nor shall a rank send more in a batch than it may receive: that would cost rounds.
    """
    num_ranks = layer.pending.shape[0]
    size = layer.now.shape[0] // num_ranks
    sends = int32_zeros(num_ranks)
    progress = True
    while progress:
        progress = False
        for rank in range(num_ranks):
            if layer.pending[rank] == 0 or layer.budget[rank] == 0:
                continue
            chosen, chosen_source, chosen_slot, best = number(-1), number(-1), number(-1), -(1 << 30)
            for slot in range(rank * size, (rank + 1) * size):
                expert = layer.new[slot]
                if layer.copies[expert, rank] > 0:
                    continue
                source = _likely_source(expert, rank, held, layer.copies, sends, ranks_per_node)
                if sends[source] >= capacity:
                    continue
                free = free_slot(layer, rank, expert, ranks_per_node)
                if free < 0:
                    break
                # Best is an arrival from a rank that sends little in this batch; then one whose own slot is free, so
                # that nothing has to move aside; then one that frees a slot of a rank in need of them.
                other = released_rank(layer, expert, rank, ranks_per_node)
                worth = 0 if other < 0 or layer.budget[other] == 0 else min(layer.pending[other], size - 1)
                if layer.new[free] == expert:
                    worth += size
                worth -= 2 * size * sends[source]
                if worth > best:
                    chosen, chosen_source, chosen_slot, best = expert, source, free, worth
            if chosen >= 0:
                arrive(layer, chosen, rank, chosen_slot, ranks_per_node)
                sends[chosen_source] += 1
                progress = True


@helper
def _likely_source(
    expert: int, rank: int, held: np.ndarray, copies: np.ndarray, sends: np.ndarray, ranks_per_node: int
) -> int:
    """The rank from which the arrival would come: the holder on the node that sends least; a rank of the node that
    receives the expert in this batch, and would relay it; else the holder anywhere that sends least."""
    begin = rank // ranks_per_node * ranks_per_node
    source, relay = number(-1), number(-1)
    for other in range(begin, begin + ranks_per_node):
        if held[expert, other] > 0:
            if source < 0 or sends[other] < sends[source]:
                source = other
        elif copies[expert, other] > 0:
            relay = other
    if source >= 0:
        return source
    if relay >= 0:
        return relay
    for other in range(sends.shape[0]):
        if held[expert, other] > 0 and (source < 0 or sends[other] < sends[source]):
            source = other
    return source
