"""Alignment: the same sets of experts with the same weights, under the names that cost the fewest moves."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from equipoise.placement.alignment import align_placement
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology
from helpers.placements import perturbed, random_map

RELABELS = ("none", "nodes", "ranks")


def random_case(rng: np.random.Generator) -> tuple[EpTopology, int, np.ndarray, np.ndarray]:
    num_nodes, ranks_per_node = int(rng.integers(1, 5)), int(rng.integers(1, 5))
    topology = EpTopology(num_nodes * ranks_per_node, num_nodes, int(rng.integers(1, 7)))
    num_experts = int(rng.integers(1, topology.num_slots + 1))
    old = random_map(rng, num_experts, topology)
    new = perturbed(rng, old, num_experts) if rng.random() < 0.3 else random_map(rng, num_experts, topology)
    return topology, num_experts, old, new


def as_metadata(row: np.ndarray, num_experts: int, topology: EpTopology, rng=None) -> ExpertLocationMetadata:
    weights = None
    if rng is not None:
        raw = rng.random(row.shape) + 0.1
        sums = np.zeros((row.shape[0], num_experts))
        for layer in range(row.shape[0]):
            np.add.at(sums[layer], row[layer], raw[layer])
        weights = raw / np.take_along_axis(sums, row, axis=1)
    return ExpertLocationMetadata.from_physical_to_logical(row, num_experts, topology, dispatch_weights=weights)


def rank_contents(metadata: ExpertLocationMetadata) -> list[tuple[tuple[int, float], ...]]:
    """Per rank, its experts with their dispatch weights, in any order."""
    experts, weights = metadata.physical_to_logical_map[0], metadata.dispatch_weights[0]
    size = metadata.topology.slots_per_rank
    pairs = list(zip(experts.tolist(), weights.tolist(), strict=True))
    return [tuple(sorted(pairs[at : at + size])) for at in range(0, len(pairs), size)]


def node_contents(metadata: ExpertLocationMetadata) -> list[tuple[tuple[tuple[int, float], ...], ...]]:
    ranks, size = rank_contents(metadata), metadata.topology.ranks_per_node
    return [tuple(sorted(ranks[at : at + size])) for at in range(0, len(ranks), size)]


@pytest.mark.parametrize("relabel", RELABELS)
@pytest.mark.parametrize("seed", range(60))
def test_alignment_keeps_who_belongs_together_and_moves_no_more(seed, relabel):
    rng = np.random.default_rng(seed)
    topology, num_experts, old_row, new_row = random_case(rng)
    old, new = as_metadata(old_row, num_experts, topology), as_metadata(new_row, num_experts, topology, rng)
    aligned = align_placement(old, new, relabel=relabel)
    assert sorted(rank_contents(new)) == sorted(rank_contents(aligned))
    if relabel != "ranks":
        assert sorted(node_contents(new)) == sorted(node_contents(aligned))
    if relabel == "none":
        assert rank_contents(new) == rank_contents(aligned)
        assert old.diff(aligned).slots_changed[0] <= old.diff(new).slots_changed[0]
    assert received(old, aligned) <= received(old, new)
    # No expert that stays on its rank changes its slot, unless the rank takes another copy of it.
    for rank in range(topology.num_ranks):
        slots = slice(rank * topology.slots_per_rank, (rank + 1) * topology.slots_per_rank)
        held, kept = old_row[0][slots], aligned.physical_to_logical_map[0].numpy()[slots]
        for expert in set(held.tolist()) & set(kept.tolist()):
            stays = min((held == expert).sum(), (kept == expert).sum())
            assert ((held == expert) & (kept == expert)).sum() == stays


def received(old: ExpertLocationMetadata, new: ExpertLocationMetadata) -> int:
    """Experts that ranks must receive: each once per rank, whatever slots it takes there."""
    return arrivals(old, new, old.topology.slots_per_rank)


def arrivals(old: ExpertLocationMetadata, new: ExpertLocationMetadata, size: int) -> int:
    """Experts new to a stretch of ``size`` slots, over all stretches."""
    before, after = (each.physical_to_logical_map[0].reshape(-1, size).tolist() for each in (old, new))
    return sum(len(set(b) - set(a)) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("seed", range(10))
def test_names_are_never_dearer_than_without_and_freedom_makes_them_cheaper(seed):
    rng = np.random.default_rng(1000 + seed)
    gained = 0
    for _ in range(40):
        topology, num_experts, old_row, new_row = random_case(rng)
        old, new = as_metadata(old_row, num_experts, topology), as_metadata(new_row, num_experts, topology)
        candidates = [new, *(align_placement(old, new, relabel=relabel) for relabel in RELABELS)]
        prices = [
            2 * received(old, each) + 3 * arrivals(old, each, topology.slots_per_rank * topology.ranks_per_node)
            for each in candidates
        ]
        assert prices == sorted(prices, reverse=True)
        assert all(received(old, each) <= received(old, new) for each in candidates)
        gained += prices[-1] < prices[-2]
    assert gained > 3


@pytest.mark.parametrize("seed", range(20))
def test_on_one_node_no_naming_of_the_ranks_receives_less(seed):
    rng = np.random.default_rng(seed)
    topology = EpTopology(int(rng.integers(2, 6)), 1, int(rng.integers(1, 6)))
    num_experts = int(rng.integers(1, topology.num_slots + 1))
    old_row, new_row = random_map(rng, num_experts, topology), random_map(rng, num_experts, topology)
    old, new = as_metadata(old_row, num_experts, topology), as_metadata(new_row, num_experts, topology)
    sets = new_row.reshape(topology.num_ranks, -1)
    least = min(
        received(old, as_metadata(sets[list(order)].reshape(1, -1), num_experts, topology))
        for order in permutations(range(topology.num_ranks))
    )
    assert received(old, align_placement(old, new)) == least


def slots_changed(new_row: list[int], relabel: str) -> int:
    """From the experts 0 to 7 in order, on 4 ranks in 2 nodes."""
    topology = EpTopology(4, 2, 2)
    old, new = as_metadata(np.arange(8)[None], 8, topology), as_metadata(np.array([new_row]), 8, topology)
    return int(old.diff(align_placement(old, new, relabel=relabel)).slots_changed[0])


def test_swapped_ranks_of_a_node_cost_nothing():
    swapped = [3, 2, 1, 0, 6, 7, 5, 4]
    assert [slots_changed(swapped, relabel) for relabel in RELABELS] == [8, 0, 0]


def test_swapped_nodes_cost_nothing():
    swapped = [7, 6, 4, 5, 2, 3, 0, 1]
    assert [slots_changed(swapped, relabel) for relabel in RELABELS] == [8, 0, 0]


def test_ranks_swapped_across_nodes_cost_nothing_where_nodes_have_no_meaning():
    swapped = [0, 1, 5, 4, 3, 2, 6, 7]
    assert [slots_changed(swapped, relabel) for relabel in RELABELS] == [4, 4, 0]


def test_of_names_that_receive_as_much_the_one_that_crosses_less_wins():
    """Expert 1 takes a slot of expert 0: on node 1, where nobody has it, or under other names on node 0."""
    topology = EpTopology(4, 2, 1)
    old = as_metadata(np.array([[0, 1, 2, 0]]), 3, topology)
    new = as_metadata(np.array([[0, 1, 2, 1]]), 3, topology)
    aligned = align_placement(old, new, relabel="ranks")
    assert old.diff(new).cross_node_moves.tolist() == [1]
    assert old.diff(aligned).moves.tolist() == [1]
    assert old.diff(aligned).cross_node_moves.tolist() == [0]
