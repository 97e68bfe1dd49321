"""The replicas that decoding opens first: no rank has more of them than any choice must give it."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_flow

from equipoise.dispatch.tables import DispatchTables
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology


def fits(ranks_of_expert: list[set[int]], num_ranks: int, most: int) -> bool:
    """Whether each expert can open one replica with at most so many on any rank: a flow of unit edges."""
    experts = len(ranks_of_expert)
    source, sink = experts + num_ranks, experts + num_ranks + 1
    capacity = np.zeros((sink + 1, sink + 1), dtype=np.int32)
    capacity[source, :experts] = 1
    for expert, ranks in enumerate(ranks_of_expert):
        capacity[expert, [experts + rank for rank in ranks]] = 1
    capacity[experts:source, sink] = most
    return bool(maximum_flow(csr_matrix(capacity), source, sink).flow_value == experts)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), ranks=st.integers(2, 12), size=st.integers(2, 5), lost=st.booleans())
def test_no_rank_opens_more_than_it_must(seed: int, ranks: int, size: int, lost: bool) -> None:
    rng = np.random.default_rng(seed)
    live = [rank for rank in range(ranks) if not (lost and rank == 0)]
    experts = rng.integers(max(len(live) * size // 2, 1), len(live) * size + 1)
    placed = rng.integers(0, experts, ranks * size)
    there = np.repeat(np.isin(np.arange(ranks), live), size)
    placed[rng.permutation(np.flatnonzero(there))[:experts]] = np.arange(experts)
    metadata = ExpertLocationMetadata.from_physical_to_logical(placed[None], int(experts), EpTopology(ranks, 1, size))
    opened = DispatchTables(metadata, live_ranks=live).host.slot_of_expert[0, :experts]
    assert np.array_equal(placed[opened], np.arange(experts))
    assert there[opened].all()
    most = int(np.bincount(opened // size, minlength=ranks).max())
    ranks_of_expert = [set(np.flatnonzero((placed == e) & there) // size) for e in range(experts)]
    assert not fits(ranks_of_expert, ranks, most - 1)
