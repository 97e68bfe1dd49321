"""Tracks what lies where while a layer is rearranged batch by batch, and which slots are free: see batches.py."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from equipoise.jit.compile import helper, int32_table, int32_zeros, number


class LayerInMotion(NamedTuple):
    """A layer between its old map and its new one; all arrays are int32 and kept up to date arrival by arrival."""

    now: np.ndarray  # (P,) expert of each slot by now
    new: np.ndarray  # (P,) expert of each slot in the end
    copies: np.ndarray  # (E, G) slots of a rank that hold an expert
    on_node: np.ndarray  # (E, N) slots of a node that hold it
    total: np.ndarray  # (E,) slots that hold it
    wanted: np.ndarray  # (E, G) 1 where a rank is to hold it in the end
    node_wants: np.ndarray  # (E, N) the same for a node
    pending: np.ndarray  # (G,) experts that have yet to arrive at a rank
    budget: np.ndarray  # (G,) experts that may arrive there in this batch


@helper
def begin_motion(
    old: np.ndarray, new: np.ndarray, num_experts: int, ranks_per_node: int, alive: np.ndarray
) -> LayerInMotion:
    """Returns a layer that still lies as in ``old`` (P,), without any budget.

    Slots of ranks that are not ``alive``, (G,) int32, count as holding and wanting nothing.
    """
    num_ranks = alive.shape[0]
    num_nodes, size = num_ranks // ranks_per_node, old.shape[0] // num_ranks
    now, total = int32_zeros(old.shape[0]), int32_zeros(num_experts)
    pending, budget = int32_zeros(num_ranks), int32_zeros(num_ranks)
    nothing = number(0)
    copies, wanted = int32_table(num_experts, num_ranks, nothing), int32_table(num_experts, num_ranks, nothing)
    on_node, node_wants = int32_table(num_experts, num_nodes, nothing), int32_table(num_experts, num_nodes, nothing)
    for slot in range(old.shape[0]):
        expert, rank = old[slot], slot // size
        now[slot] = expert
        if alive[rank] == 0:
            continue
        copies[expert, rank] += 1
        on_node[expert, rank // ranks_per_node] += 1
        total[expert] += 1
        wanted[new[slot], rank] = 1
        node_wants[new[slot], rank // ranks_per_node] = 1
    for rank in range(num_ranks):
        for expert in range(num_experts):
            if wanted[expert, rank] > 0 and copies[expert, rank] == 0:
                pending[rank] += 1
    return LayerInMotion(now, new, copies, on_node, total, wanted, node_wants, pending, budget)


@helper
def max_of(values: np.ndarray) -> int:
    largest = values[0]
    for value in values:
        largest = max(largest, value)
    return largest


@helper
def free_slot(layer: LayerInMotion, rank: int, expert: int, ranks_per_node: int) -> int:
    """A slot of ``rank`` whose content may go, if possible one that is to hold ``expert``; -1: none."""
    size = layer.now.shape[0] // layer.pending.shape[0]
    node = rank // ranks_per_node
    found = number(-1)
    for slot in range(rank * size, (rank + 1) * size):
        content = layer.now[slot]
        if content == layer.new[slot]:
            continue
        if layer.wanted[content, rank] > 0:
            free = layer.copies[content, rank] > 1
        elif layer.node_wants[content, node] > 0:
            free = layer.on_node[content, node] > 1
        else:
            free = layer.total[content] > 1
        if free:
            if layer.new[slot] == expert:
                return slot
            if found < 0:
                found = slot
    return found


@helper
def released_rank(layer: LayerInMotion, expert: int, rank: int, ranks_per_node: int) -> int:
    """The rank whose critical copy may go once ``expert`` has arrived at ``rank``; -1: no copy waits for that."""
    node = rank // ranks_per_node
    if layer.on_node[expert, node] == 1:
        for other in range(node * ranks_per_node, (node + 1) * ranks_per_node):
            if layer.copies[expert, other] == 1:
                return -1 if layer.wanted[expert, other] > 0 else other
    if layer.on_node[expert, node] == 0 and layer.total[expert] == 1:
        for other in range(layer.pending.shape[0]):
            if layer.copies[expert, other] == 1:
                if layer.wanted[expert, other] > 0 or layer.node_wants[expert, other // ranks_per_node] > 0:
                    return -1
                return other
    return -1


@helper
def arrive(layer: LayerInMotion, expert: int, rank: int, free: int, ranks_per_node: int) -> None:
    """Puts ``expert`` into its first slot on ``rank``; what lay there and is still needed moves to slot ``free``."""
    now, new = layer.now, layer.new
    size = now.shape[0] // layer.pending.shape[0]
    node = rank // ranks_per_node
    gone = now[free]
    layer.copies[gone, rank] -= 1
    layer.on_node[gone, node] -= 1
    layer.total[gone] -= 1
    target = free
    if new[free] != expert:
        for slot in range(rank * size, (rank + 1) * size):
            if new[slot] == expert:
                target = slot
                break
    now[free] = now[target]
    now[target] = expert
    layer.copies[expert, rank] += 1
    layer.on_node[expert, node] += 1
    layer.total[expert] += 1
    layer.pending[rank] -= 1
    layer.budget[rank] -= 1
