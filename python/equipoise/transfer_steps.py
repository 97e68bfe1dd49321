"""Splits a change of placement into steps in which no rank receives more experts than it may stage.

After every step the layer is a complete placement again, so it can commit and serve. What makes that possible with a
single staging slot per rank:

An expert must arrive at a rank; the arrival needs a **place**, a slot whose content may go. Content may go when the
rank is not to keep it and another copy remains: on the node, if the node is to keep the expert (so that no expert
crosses to a node twice), else anywhere. Otherwise the copy is **critical**, and waits for an arrival of the same expert
elsewhere. Arrivals that find a place are taken first. When no rank with an arrival to come has a place left, every
arrival releases exactly one critical copy and every rank has as many critical copies as arrivals: the graph "an arrival
here releases a place there" is Eulerian, so it has a simple cycle, and all arrivals of a cycle can happen in one commit
with one expert per rank. Slots that hold an expert of their rank in the wrong place are put right by copies inside the
rank.
"""

from __future__ import annotations

import numpy as np
from numba import njit

# Columns of a rank's or expert's counters are indexed (expert, rank) and (expert, node).


@njit(cache=True)
def split_into_steps(
    old: np.ndarray,
    new: np.ndarray,
    num_experts: int,
    num_ranks: int,
    ranks_per_node: int,
    capacity: int,
) -> np.ndarray:
    """The placements after each step.

    Args:
        old: (P,) int32.
        new: (P,) int32.
        num_experts: ``E``; each has a slot in both maps.
        num_ranks: ``G``.
        ranks_per_node: ranks of a node.
        capacity: most experts that a rank may receive in a step, at least 1.

    Returns:
        (steps, P) int32; the last row is ``new``. One row if every rank receives at most ``capacity`` experts.
    """
    slots_per_rank = old.size // num_ranks
    num_nodes = num_ranks // ranks_per_node
    row = old.copy()
    copies = np.zeros((num_experts, num_ranks), np.int32)
    on_node = np.zeros((num_experts, num_nodes), np.int32)
    wanted = np.zeros((num_experts, num_ranks), np.bool_)
    node_wants = np.zeros((num_experts, num_nodes), np.bool_)
    for slot in range(old.size):
        rank = slot // slots_per_rank
        copies[row[slot], rank] += 1
        on_node[row[slot], rank // ranks_per_node] += 1
        wanted[new[slot], rank] = True
        node_wants[new[slot], rank // ranks_per_node] = True
    total = on_node.sum(axis=1)
    pending = np.zeros(num_ranks, np.int32)
    for rank in range(num_ranks):
        for expert in range(num_experts):
            pending[rank] += wanted[expert, rank] and copies[expert, rank] == 0
    maps = np.empty((pending.sum() + 1, old.size), np.int32)
    num_steps = 0
    budget = np.empty(num_ranks, np.int32)
    while pending.max() > capacity:
        budget[:] = capacity
        _take_arrivals_with_a_place(
            row, new, copies, on_node, total, wanted, node_wants, pending, budget, copies.copy(), ranks_per_node
        )
        _take_cycles(row, new, copies, on_node, total, wanted, node_wants, pending, budget, ranks_per_node)
        assert budget.min() < capacity  # the step does something: see the module
        maps[num_steps] = row
        num_steps += 1
    maps[num_steps] = new
    return maps[: num_steps + 1].copy()


@njit(cache=True)
def _free_place(
    rank: int,
    row: np.ndarray,
    new: np.ndarray,
    copies: np.ndarray,
    on_node: np.ndarray,
    total: np.ndarray,
    wanted: np.ndarray,
    node_wants: np.ndarray,
    ranks_per_node: int,
    expert: int,
) -> int:
    """A slot of ``rank`` whose content may go, if possible one that is to hold ``expert``; -1: none."""
    slots_per_rank = row.size // copies.shape[1]
    node = rank // ranks_per_node
    found = -1
    for slot in range(rank * slots_per_rank, (rank + 1) * slots_per_rank):
        content = row[slot]
        if content == new[slot]:
            continue
        if wanted[content, rank]:
            free = copies[content, rank] > 1
        elif node_wants[content, node]:
            free = on_node[content, node] > 1
        else:
            free = total[content] > 1
        if free:
            if new[slot] == expert:
                return slot
            if found < 0:
                found = slot
    return found


@njit(cache=True)
def _released_rank(
    expert: int,
    rank: int,
    copies: np.ndarray,
    on_node: np.ndarray,
    total: np.ndarray,
    wanted: np.ndarray,
    node_wants: np.ndarray,
    ranks_per_node: int,
) -> int:
    """The rank whose critical copy may go once ``expert`` has arrived at ``rank``; -1: no copy waits for that."""
    node = rank // ranks_per_node
    if on_node[expert, node] == 1:
        for other in range(node * ranks_per_node, (node + 1) * ranks_per_node):
            if copies[expert, other] == 1:
                return -1 if wanted[expert, other] else other
    if on_node[expert, node] == 0 and total[expert] == 1:
        for other in range(copies.shape[1]):
            if copies[expert, other] == 1:
                if wanted[expert, other] or node_wants[expert, other // ranks_per_node]:
                    return -1
                return other
    return -1


@njit(cache=True)
def _arrive(
    expert: int,
    rank: int,
    place: int,
    row: np.ndarray,
    new: np.ndarray,
    copies: np.ndarray,
    on_node: np.ndarray,
    total: np.ndarray,
    pending: np.ndarray,
    budget: np.ndarray,
    ranks_per_node: int,
) -> None:
    """Puts ``expert`` into its first slot on ``rank``; what lay there and is still needed moves to ``place``."""
    slots_per_rank = row.size // copies.shape[1]
    node = rank // ranks_per_node
    gone = row[place]
    copies[gone, rank] -= 1
    on_node[gone, node] -= 1
    total[gone] -= 1
    target = place
    if new[place] != expert:
        for slot in range(rank * slots_per_rank, (rank + 1) * slots_per_rank):
            if new[slot] == expert:
                target = slot
                break
    row[place] = row[target]
    row[target] = expert
    copies[expert, rank] += 1
    on_node[expert, node] += 1
    total[expert] += 1
    pending[rank] -= 1
    budget[rank] -= 1


@njit(cache=True)
def _take_arrivals_with_a_place(
    row: np.ndarray,
    new: np.ndarray,
    copies: np.ndarray,
    on_node: np.ndarray,
    total: np.ndarray,
    wanted: np.ndarray,
    node_wants: np.ndarray,
    pending: np.ndarray,
    budget: np.ndarray,
    held: np.ndarray,
    ranks_per_node: int,
) -> None:
    """Rank after rank, one arrival at a time, until no rank with budget has both an arrival to come and a place.

    Nor shall a rank send more in a step than it may receive: that would cost rounds.
    """
    num_ranks = pending.size
    slots_per_rank = row.size // num_ranks
    sends = np.zeros(num_ranks, np.int32)
    capacity = budget.max()
    progress = True
    while progress:
        progress = False
        for rank in range(num_ranks):
            if pending[rank] == 0 or budget[rank] == 0:
                continue
            chosen, chosen_source, chosen_place, best = -1, -1, -1, -(1 << 30)
            for slot in range(rank * slots_per_rank, (rank + 1) * slots_per_rank):
                expert = new[slot]
                if copies[expert, rank] > 0:
                    continue
                source = _likely_source(expert, rank, held, copies, sends, ranks_per_node)
                if sends[source] >= capacity:
                    continue
                place = _free_place(rank, row, new, copies, on_node, total, wanted, node_wants, ranks_per_node, expert)
                if place < 0:
                    break
                # Best is an arrival from a rank that sends little in this step; then one whose own slot is free, so
                # that nothing has to move aside; then one that gives a place to a rank in need of places.
                other = _released_rank(expert, rank, copies, on_node, total, wanted, node_wants, ranks_per_node)
                worth = 0 if other < 0 or budget[other] == 0 else min(pending[other], slots_per_rank - 1)
                if new[place] == expert:
                    worth += slots_per_rank
                worth -= 2 * slots_per_rank * sends[source]
                if worth > best:
                    chosen, chosen_source, chosen_place, best = expert, source, place, worth
            if chosen >= 0:
                _arrive(chosen, rank, chosen_place, row, new, copies, on_node, total, pending, budget, ranks_per_node)
                sends[chosen_source] += 1
                progress = True


@njit(cache=True)
def _likely_source(
    expert: int, rank: int, held: np.ndarray, copies: np.ndarray, sends: np.ndarray, ranks_per_node: int
) -> int:
    """The rank from which the arrival would come: the holder on the node that sends least; a rank of the node that
    receives the expert in this step, and would relay it; else the holder anywhere that sends least."""
    begin = rank // ranks_per_node * ranks_per_node
    source, relay = -1, -1
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
    for other in range(sends.size):
        if held[expert, other] > 0 and (source < 0 or sends[other] < sends[source]):
            source = other
    return source


@njit(cache=True)
def _take_cycles(
    row: np.ndarray,
    new: np.ndarray,
    copies: np.ndarray,
    on_node: np.ndarray,
    total: np.ndarray,
    wanted: np.ndarray,
    node_wants: np.ndarray,
    pending: np.ndarray,
    budget: np.ndarray,
    ranks_per_node: int,
) -> None:
    """Takes simple cycles of arrivals, each of which releases the next one's place, as long as budgets allow."""
    num_ranks = pending.size
    slots_per_rank = row.size // num_ranks
    state = np.zeros(num_ranks, np.int32)  # 0: not seen, 1: on the path, 2: no cycle through here
    path = np.empty(num_ranks, np.int32)
    arriving = np.empty(num_ranks, np.int32)  # the expert by which the path leaves path[i]
    cursor = np.zeros(num_ranks, np.int32)  # next slot of a rank to look at
    for start in range(num_ranks):
        depth = 0
        if state[start] == 0 and pending[start] > 0 and budget[start] > 0:
            path[0], state[start], depth = start, 1, 1
        while depth > 0:
            rank = path[depth - 1]
            onward = -1
            while onward < 0 and cursor[rank] < slots_per_rank:
                expert = new[rank * slots_per_rank + cursor[rank]]
                cursor[rank] += 1
                if copies[expert, rank] > 0:
                    continue
                other = _released_rank(expert, rank, copies, on_node, total, wanted, node_wants, ranks_per_node)
                if other >= 0 and state[other] != 2 and pending[other] > 0 and budget[other] > 0:
                    onward, arriving[depth - 1] = other, expert
            if onward < 0:
                state[rank] = 2
                depth -= 1
            elif state[onward] == 0:
                path[depth], state[onward] = onward, 1
                depth += 1
            else:
                first = depth - 1
                while path[first] != onward:
                    first -= 1
                _take_cycle(
                    path[first:depth], arriving[first:depth], row, new, copies, on_node, total, pending, budget,
                    ranks_per_node,
                )  # fmt: skip
                # Ranks of the cycle can be met again, with what budget they have left, from a later start.
                for i in range(depth):
                    state[path[i]] = 0
                    cursor[path[i]] = 0
                depth = 0
                if pending[start] > 0 and budget[start] > 0:
                    path[0], state[start], depth = start, 1, 1


@njit(cache=True)
def _take_cycle(
    ranks: np.ndarray,
    experts: np.ndarray,
    row: np.ndarray,
    new: np.ndarray,
    copies: np.ndarray,
    on_node: np.ndarray,
    total: np.ndarray,
    pending: np.ndarray,
    budget: np.ndarray,
    ranks_per_node: int,
) -> None:
    """``experts[i]`` arrives at ``ranks[i]``, which releases its copy on ``ranks[i + 1]``, and around."""
    slots_per_rank = row.size // copies.shape[1]
    places = np.empty(ranks.size, np.int32)
    for i in range(ranks.size):
        released_on = ranks[(i + 1) % ranks.size]
        for slot in range(released_on * slots_per_rank, (released_on + 1) * slots_per_rank):
            if row[slot] == experts[i]:
                places[(i + 1) % ranks.size] = slot
    for i in range(ranks.size):
        _arrive(experts[i], ranks[i], places[i], row, new, copies, on_node, total, pending, budget, ranks_per_node)
