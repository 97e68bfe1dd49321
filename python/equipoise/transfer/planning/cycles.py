"""Finds cycles of arrivals, each of which frees the slot that the next one needs: see batches.py."""

from __future__ import annotations

import numpy as np

from equipoise.jit.compile import helper, inlined, int32_zeros, number
from equipoise.transfer.planning.layer_in_motion import LayerInMotion, arrive, released_rank

_NOT_SEEN, _ON_PATH, _NO_CYCLE = 0, 1, 2  # states of a rank


@inlined
def take_cycles(layer: LayerInMotion, ranks_per_node: int) -> None:
    """Takes simple cycles of arrivals, found depth first, as long as budgets allow."""
    num_ranks = layer.pending.shape[0]
    size = layer.now.shape[0] // num_ranks
    state, path = int32_zeros(num_ranks), int32_zeros(num_ranks)
    arriving = int32_zeros(num_ranks)  # the expert by which the path leaves path[i]
    cursor = int32_zeros(num_ranks)  # next slot of a rank to look at
    for start in range(num_ranks):
        depth = 0
        if state[start] == _NOT_SEEN and _may_receive(layer, start):
            path[0], state[start], depth = start, _ON_PATH, 1
        while depth > 0:
            rank = number(path[depth - 1])
            onward = number(-1)
            while onward < 0 and cursor[rank] < size:
                expert = layer.new[rank * size + cursor[rank]]
                cursor[rank] += 1
                if layer.copies[expert, rank] > 0:
                    continue
                other = released_rank(layer, expert, rank, ranks_per_node)
                if other >= 0 and state[other] != _NO_CYCLE and _may_receive(layer, other):
                    onward, arriving[depth - 1] = other, expert
            if onward < 0:
                state[rank] = _NO_CYCLE
                depth -= 1
            elif state[onward] == _NOT_SEEN:
                path[depth], state[onward] = onward, _ON_PATH
                depth += 1
            else:
                first = depth - 1
                while path[first] != onward:
                    first -= 1
                _take_cycle(layer, path, arriving, first, depth, ranks_per_node)
                # Ranks of the cycle can be met again, with what budget they have left, from a later start.
                for i in range(depth):
                    state[path[i]] = _NOT_SEEN
                    cursor[path[i]] = 0
                depth = 0
                if _may_receive(layer, start):
                    path[0], state[start], depth = start, _ON_PATH, 1


@helper
def _may_receive(layer: LayerInMotion, rank: int) -> bool:
    return layer.pending[rank] > 0 and layer.budget[rank] > 0


@helper
def _take_cycle(
    layer: LayerInMotion, path: np.ndarray, arriving: np.ndarray, first: int, last: int, ranks_per_node: int
) -> None:
    """``arriving[i]`` arrives at ``path[i]``, which releases its copy on ``path[i + 1]``, around first..last-1."""
    size = layer.now.shape[0] // layer.pending.shape[0]
    free_slots = int32_zeros(last - first)
    for i in range(first, last):
        following = (i + 1 - first) % (last - first)
        rank = path[first + following]
        for slot in range(rank * size, (rank + 1) * size):
            if layer.now[slot] == arriving[i]:
                free_slots[following] = slot
    for i in range(first, last):
        arrive(layer, number(arriving[i]), number(path[i]), number(free_slots[i - first]), ranks_per_node)
