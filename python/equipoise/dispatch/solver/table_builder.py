"""Builds the index tables of a layer from its placement: numba kernels.

A build must be short, since it runs between two forward passes, at every commit. Replicas of an expert that share a
rank become one choice, with the sum of their weights: which of them computes a token makes no difference to the rank's
load, and one alone reads the weights once.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeAlias, TypeVar

import numpy as np

from equipoise.dispatch.solver.primaries import choose_primaries
from equipoise.jit.compile import helper, int_zeros, kernel
from equipoise.jit.sort import descending

WEIGHT_BITS = 16  # planned shares are kept in 65536ths
MAX_COLOURS = 32  # colours of a layer that is swept; beyond, ranks hold too many replicated experts for it to pay
# Columns of TableArrays.sizes
NUM_ROWS, NUM_COLOURS, MAX_UNITS, NUM_RANKS, MAX_ACTIVE, NUM_REPLICAS, NUM_SIZES = 0, 1, 2, 3, 4, 5, 6
_MAX_UNITS = 1 << 27  # fixed-point units in all loads of a layer together: products with momentum stay below 2**31


Array = TypeVar("Array")


class TableArrays(NamedTuple, Generic[Array]):
    """What dispatch looks up, for every layer; int32 arrays (numpy or torch), padded with -1.

    ``M`` rows, one for each expert on several ranks; ``C`` choices of a row, each another rank; ``D`` rows that a
    rank takes part in; ``S`` slots of a rank.
    """

    expert: Array  # (L, M) logical expert of a row
    num_choices: Array  # (L, M), 0 for padding
    slot: Array  # (L, M, C); column 0 is the primary: the one that decoding opens first
    rank: Array  # (L, M, C) rank of that slot
    weight: Array  # (L, M, C) planned share in 65536ths, 0 for padding
    colour: Array  # (L, M); rows of one colour share no rank
    step: Array  # (L, M) 2**32 / (1 + most rows on any of its ranks): the inverse step length
    row_of_expert: Array  # (L, E), -1: on one rank alone
    slot_of_expert: Array  # (L, E) its slot, the primary if there are several
    rank_of_single: Array  # (L, E) its rank, -1: on several
    choices_of_rank: Array  # (L, D, G) places of the rank's choices in a (C, M) table
    singles_of_rank: Array  # (L, S, G) experts that only this rank holds
    sizes: Array  # (L, NUM_SIZES): rows, colours (0: no sweep), most fixed-point units, ranks, slots of a rank, choices


NumpyTables: TypeAlias = TableArrays[np.ndarray]


@kernel
def build_layers(
    layers: np.ndarray,
    physical_to_logical: np.ndarray,
    weights: np.ndarray,
    live: np.ndarray,
    tables: NumpyTables,
) -> tuple[int, int, int]:
    """Fills the tables of ``layers``.

    Args:
        layers: (N,) int64 layer ids.
        physical_to_logical: (N, P) int64, of those layers.
        weights: (N, P) float32 dispatch weights.
        live: (G,) bool; slots of other ranks are left out.

    Returns:
        Layer and expert of the first expert without a slot on a live rank, -1 and -1 if each has one, and the number
        of experts that have more choices than fit.
    """
    cut = 0
    for n in range(len(layers)):
        layer = layers[n]
        missing, more = _build_rows(layer, physical_to_logical[n], weights[n], live, tables)
        if missing >= 0:
            return layer, missing, cut
        cut += more
        rows = tables.sizes[layer, NUM_ROWS]
        choose_primaries(
            tables.rank_of_single[layer],
            tables.num_choices[layer, :rows],
            live.shape[0],
            tables.slot[layer],
            tables.rank[layer],
            tables.weight[layer],
        )
        for m in range(rows):
            tables.slot_of_expert[layer, tables.expert[layer, m]] = tables.slot[layer, m, 0]
        _colour(layer, live.shape[0], tables)
        _index_ranks(layer, tables)
    return -1, -1, cut


@helper
def _build_rows(
    layer: int,
    expert_of_slot: np.ndarray,
    weight_of_slot: np.ndarray,
    live: np.ndarray,
    tables: NumpyTables,
) -> tuple[int, int]:
    """Rows and singles; returns an expert without a live slot (-1: none) and how many rows had to be cut."""
    num_ranks, num_slots = live.shape[0], expert_of_slot.shape[0]
    num_experts, width = tables.row_of_expert.shape[1], tables.slot.shape[2]
    order, first = _slots_by_expert(expert_of_slot, num_experts)
    slots, ranks, shares = int_zeros(num_ranks), int_zeros(num_ranks), np.empty(num_ranks)
    tables.expert[layer] = -1
    tables.num_choices[layer] = 0
    tables.slot[layer] = -1
    tables.rank[layer] = -1
    tables.weight[layer] = 0
    rows = cut = most = replicas = 0
    for e in range(num_experts):
        size = 0
        for i in range(first[e], first[e + 1]):
            rank = order[i] * num_ranks // num_slots
            if not live[rank]:
                continue
            if size > 0 and ranks[size - 1] == rank:
                shares[size - 1] += weight_of_slot[order[i]]
                continue
            slots[size], ranks[size], shares[size] = order[i], rank, weight_of_slot[order[i]]
            size += 1
        if size == 0:
            return e, cut
        tables.slot_of_expert[layer, e] = slots[0]
        replicas += min(size, width)
        if size == 1:
            tables.row_of_expert[layer, e], tables.rank_of_single[layer, e] = -1, ranks[0]
            continue
        cut += size > width
        while size > width:
            size = _drop_smallest(slots, ranks, shares, size)
        tables.row_of_expert[layer, e], tables.rank_of_single[layer, e] = rows, -1
        tables.expert[layer, rows], tables.num_choices[layer, rows] = e, size
        total = shares[:size].sum()
        for j in range(size):
            share = shares[j] / total if total > 0 else 1.0 / size
            tables.slot[layer, rows, j], tables.rank[layer, rows, j] = slots[j], ranks[j]
            tables.weight[layer, rows, j] = int(share * (1 << WEIGHT_BITS))
        most = max(most, size)
        rows += 1
    tables.sizes[layer, NUM_ROWS] = rows
    tables.sizes[layer, NUM_RANKS], tables.sizes[layer, MAX_ACTIVE] = num_ranks, num_slots // num_ranks
    tables.sizes[layer, NUM_REPLICAS] = replicas
    # Sums over a row's choices must stay in 31 bits as well.
    tables.sizes[layer, MAX_UNITS] = min(_MAX_UNITS, (1 << 30) // max(most, 1))
    return -1, cut


@helper
def _slots_by_expert(expert_of_slot: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Slots sorted by expert, ascending within one, and where each expert's begin; counting sort."""
    first = int_zeros(num_experts + 1)
    for slot in range(expert_of_slot.shape[0]):
        first[expert_of_slot[slot] + 1] += 1
    for e in range(num_experts):
        first[e + 1] += first[e]
    order, place = int_zeros(expert_of_slot.shape[0]), first.copy()
    for slot in range(expert_of_slot.shape[0]):
        e = expert_of_slot[slot]
        order[place[e]] = slot
        place[e] += 1
    return order, first


@helper
def _drop_smallest(slots: np.ndarray, ranks: np.ndarray, shares: np.ndarray, size: int) -> int:
    """Takes the choice with the smallest share away, the last of equal ones; returns how many are left."""
    smallest = 0
    for j in range(1, size):
        if shares[j] <= shares[smallest]:
            smallest = j
    for j in range(smallest, size - 1):
        slots[j], ranks[j], shares[j] = slots[j + 1], ranks[j + 1], shares[j + 1]
    return size - 1


@helper
def _colour(layer: int, num_ranks: int, tables: NumpyTables) -> None:
    """Colours rows greedily, most choices first, so that rows of one colour share no rank; step lengths as well."""
    rows = tables.sizes[layer, NUM_ROWS]
    tables.colour[layer] = -1
    tables.step[layer] = 0
    taken, degree = int_zeros(num_ranks), int_zeros(num_ranks)  # colours of a rank's rows as bits; how many rows
    colours = 0
    for m in descending(tables.num_choices[layer, :rows].astype(np.float64)):
        used = 0
        for j in range(tables.num_choices[layer, m]):
            used |= taken[tables.rank[layer, m, j]]
            degree[tables.rank[layer, m, j]] += 1
        colour = 0
        while colour < MAX_COLOURS and (used >> colour) & 1:
            colour += 1
        tables.colour[layer, m] = colour
        colours = max(colours, colour + 1)
        for j in range(tables.num_choices[layer, m]):
            taken[tables.rank[layer, m, j]] |= 1 << colour
    tables.sizes[layer, NUM_COLOURS] = colours if colours <= MAX_COLOURS else 0
    for m in range(rows):
        most = 1
        for j in range(tables.num_choices[layer, m]):
            most = max(most, degree[tables.rank[layer, m, j]])
        tables.step[layer, m] = min((1 << 32) // (1 + most), (1 << 31) - 1)


@helper
def _index_ranks(layer: int, tables: NumpyTables) -> None:
    """The same tables seen from the ranks: kernels on a GPU gather where a CPU scatters."""
    tables.choices_of_rank[layer] = -1
    tables.singles_of_rank[layer] = -1
    num_ranks, padded_rows = tables.singles_of_rank.shape[2], tables.expert.shape[1]
    choices, singles = int_zeros(num_ranks), int_zeros(num_ranks)
    for m in range(tables.sizes[layer, NUM_ROWS]):
        for j in range(tables.num_choices[layer, m]):
            rank = tables.rank[layer, m, j]
            tables.choices_of_rank[layer, choices[rank], rank] = j * padded_rows + m
            choices[rank] += 1
    for e in range(tables.rank_of_single.shape[1]):
        rank = tables.rank_of_single[layer, e]
        if rank >= 0:
            tables.singles_of_rank[layer, singles[rank], rank] = e
            singles[rank] += 1
