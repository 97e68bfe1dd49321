"""The transfer planner against the rules it promises, on random placements."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from equipoise.errors import PlacementError
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology
from equipoise.transfer.planning.plan import SlotCase, TransferPlan, plan_transfer
from equipoise.transfer.planning.sources import chunk_of
from helpers.placements import perturbed, random_map


@st.composite
def transitions(draw):
    """(topology, num_experts, old map, new map), each map (1, P)."""
    num_nodes, ranks_per_node = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    topology = EpTopology(num_nodes * ranks_per_node, num_nodes, draw(st.integers(1, 5)))
    num_experts = draw(st.integers(1, topology.num_slots))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    old = random_map(rng, num_experts, topology)
    new = perturbed(rng, old, num_experts) if draw(st.booleans()) else random_map(rng, num_experts, topology)
    return topology, num_experts, old, new


def holders(row: np.ndarray, topology: EpTopology) -> list[set[int]]:
    return [set(row[slot : slot + topology.slots_per_rank]) for slot in range(0, row.size, topology.slots_per_rank)]


@settings(max_examples=300, deadline=None)
@given(transitions())
def test_each_missing_expert_reaches_its_rank_once_from_one_that_has_it(case):
    topology, num_experts, old, new = case
    plan = plan_transfer(old, new, topology, num_logical_experts=num_experts)
    before, after = holders(old[0], topology), holders(new[0], topology)
    needed = Counter((int(x), g) for g in range(topology.num_ranks) for x in after[g] - before[g])
    transfers = plan.layers[0].batches[0].transfers if plan.layers else []
    assert Counter((t.expert, topology.rank_of_slot(t.destination_slot)) for t in transfers) == needed
    arrived: dict[tuple[int, int], int] = {}
    for t in transfers:
        source = topology.rank_of_slot(t.source_slot)
        assert new[0, t.destination_slot] == t.expert
        if t.relayed:
            assert arrived[t.expert, source] < t.round
            assert new[0, t.source_slot] == t.expert
        else:
            assert old[0, t.source_slot] == t.expert
        arrived[t.expert, topology.rank_of_slot(t.destination_slot)] = t.round


@settings(max_examples=300, deadline=None)
@given(transitions())
def test_an_expert_crosses_to_a_node_once_and_only_if_the_node_lacks_it(case):
    topology, num_experts, old, new = case
    plan = plan_transfer(old, new, topology, num_logical_experts=num_experts)
    on_node = [set(part) for part in old[0].reshape(topology.num_nodes, -1)]
    wanted = [set(part) for part in new[0].reshape(topology.num_nodes, -1)]
    lower_bound = Counter((int(x), n) for n in range(topology.num_nodes) for x in wanted[n] - on_node[n])
    crossings = Counter(
        (t.expert, topology.node_of_slot(t.destination_slot))
        for layer in plan.layers
        for t in layer.batches[0].transfers
        if topology.node_of_slot(t.source_slot) != topology.node_of_slot(t.destination_slot)
    )
    assert crossings == lower_bound


@settings(max_examples=300, deadline=None)
@given(transitions())
def test_a_round_uses_each_link_once_and_rounds_meet_the_edge_colouring_bound(case):
    topology, num_experts, old, new = case
    plan = plan_transfer(old, new, topology, num_logical_experts=num_experts)
    for layer in plan.layers:
        transfers = layer.batches[0].transfers
        expected_rounds = 0
        for relayed in (0, 1):
            phase = [t for t in transfers if t.relayed == relayed]
            sent = Counter(topology.rank_of_slot(t.source_slot) for t in phase)
            received = Counter(topology.rank_of_slot(t.destination_slot) for t in phase)
            expected_rounds += max([*sent.values(), *received.values()], default=0)
        assert layer.num_rounds <= expected_rounds
        if not any(t.relayed for t in transfers):
            assert layer.num_rounds == expected_rounds
        for side in ("source_slot", "destination_slot"):
            uses = Counter((t.round, topology.rank_of_slot(getattr(t, side))) for t in transfers)
            assert all(count == 1 for count in uses.values())


@settings(max_examples=200, deadline=None)
@given(transitions())
def test_the_busiest_sender_carries_no_more_than_a_maximum_flow_allows(case):
    topology, num_experts, old, new = case
    plan = plan_transfer(old, new, topology, num_logical_experts=num_experts)
    for layer in plan.layers:
        transfers = layer.batches[0].transfers
        load = Counter(topology.rank_of_slot(t.source_slot) for t in transfers)
        relay_load = Counter(topology.rank_of_slot(t.source_slot) for t in transfers if t.relayed)
        jobs = [allowed_sources(t, old[0], topology) for t in transfers if not t.relayed]
        busiest = max(load.values(), default=0)
        assert busiest == 0 or not feasible(jobs, relay_load, busiest - 1, topology.num_ranks)


def allowed_sources(transfer, row, topology) -> list[int]:
    having = {topology.rank_of_slot(slot) for slot in np.flatnonzero(row == transfer.expert).tolist()}
    node = topology.node_of_slot(transfer.destination_slot)
    inside = [g for g in having if topology.node_of_rank(g) == node]
    return inside or sorted(having)


def feasible(jobs: list[list[int]], base: Counter, limit: int, num_ranks: int) -> bool:
    """Whether all jobs can be sent with no rank sending more than ``limit`` in all."""
    if any(base[g] > limit for g in base):
        return False
    size = 2 + len(jobs) + num_ranks
    graph = np.zeros((size, size), np.int32)
    for i, sources in enumerate(jobs):
        graph[0, 2 + i] = 1
        for g in sources:
            graph[2 + i, 2 + len(jobs) + g] = 1
    for g in range(num_ranks):
        graph[2 + len(jobs) + g, 1] = limit - base[g]
    return maximum_flow(csr_array(graph), 0, 1).flow_value == len(jobs)


@settings(max_examples=100, deadline=None)
@given(transitions())
def test_a_plan_is_the_same_again_and_survives_json(case):
    topology, num_experts, old, new = case
    plan = plan_transfer(old, new, topology, num_logical_experts=num_experts)
    again = plan_transfer(old.copy(), new.copy(), topology, num_logical_experts=num_experts)
    assert plan.digest == again.digest
    read = TransferPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert read.digest == plan.digest
    assert read.topology == topology


def test_digest_is_pinned_across_machines():
    old = [[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1, 2, 3]]
    new = [[0, 1, 2, 3, 0, 1, 2, 3], [3, 1, 2, 0, 0, 0, 2, 1]]
    plan = plan_transfer(old, new, EpTopology(4, 2, 2))
    assert [layer.layer_id for layer in plan.layers] == [1]
    assert plan.digest == "635148fd8fc43e5058b96dda2df676bbd6b96d19fb2b5759e32b1dd1f1a2b7ab"


def test_the_five_cases():
    #        rank 0   rank 1   rank 2   rank 3      nodes {0, 1} and {2, 3}
    old = [[0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2]]
    new = [[0, 2, 1, 0, 4, 5, 3, 3, 8, 6, 7, 2]]
    topology = EpTopology(4, 2, 3)
    cases = plan_transfer(old, new, topology).layers[0].batches[0].slot_cases(topology)
    assert cases[0:3] == [SlotCase.UNCHANGED, SlotCase.COPY, SlotCase.COPY]
    assert cases[3] == SlotCase.SAME_NODE
    assert cases[6:8] == [SlotCase.OTHER_NODE, SlotCase.FREE_RIDER]
    assert cases[9:12] == [SlotCase.SAME_NODE, SlotCase.SAME_NODE, SlotCase.UNCHANGED]


def test_a_layer_that_does_not_change_costs_nothing():
    topology = EpTopology(4, 2, 2)
    old = random_map(np.random.default_rng(1), 6, topology, num_layers=3)
    plan = plan_transfer(old, old.copy(), topology)
    assert plan.layers == ()
    assert plan.num_transfers == 0


def test_destinations_are_split_over_sources_in_contiguous_chunks():
    for num_elements in range(1, 30):
        for num_chunks in range(1, 12):
            chunks = [chunk_of(i, num_elements, num_chunks) for i in range(num_elements)]
            assert chunks == sorted(chunks)
            sizes = Counter(chunks)
            all_sizes = [sizes[c] for c in range(num_chunks)]
            assert max(all_sizes) - min(all_sizes) <= 1


def test_metadata_and_raw_maps_give_the_same_plan():
    topology = EpTopology(4, 2, 3)
    rng = np.random.default_rng(3)
    old, new = random_map(rng, 9, topology, 4), random_map(rng, 9, topology, 4)
    metadata = [ExpertLocationMetadata.from_physical_to_logical(m, 9, topology) for m in (old, new)]
    assert plan_transfer(*metadata, topology).digest == plan_transfer(old, new, topology).digest


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ([[0, 1, 2, 3]], [[0, 1, 2, 2]], "new has no slot for expert 3 in layer 0"),
        ([[0, 1, 2, 3]], [[0, 1, 2, 9]], "outside [0, 4)"),
        ([[0, 1, 2, 3]], [[0, 1, 2, 2**32 + 3]], "outside [0, 4)"),
        ([[0, 1, 2, 2**32]], [[0, 1, 2, 3]], "old has 4 slots for 4294967297 logical experts"),
        ([[0, 1, 2, 3]], [[0, 1, 2]], "must have shape (layers, 4)"),
        ([[0, 1, 2, 3]], [[0, 1, 2, 3], [0, 1, 2, 3]], "old has shape (1, 4), new has (2, 4)"),
        ([[0.0, 1, 2, 3]], [[0, 1, 2, 3]], "must hold integers"),
        ([[0, 1, 3, 3]], [[0, 1, 3, 3]], "old has no slot for expert 2"),
    ],
)
def test_unusable_placements_are_named(old, new, words):
    with pytest.raises(PlacementError) as caught:
        plan_transfer(old, new, EpTopology(2, 1, 2))
    assert words in str(caught.value)


def test_a_damaged_plan_is_refused():
    data = plan_transfer([[0, 1, 2, 3]], [[1, 0, 3, 2]], EpTopology(2, 1, 2)).to_dict()
    data["layers"][0]["batches"][0]["new_map"] = [0, 1, 3, 2]
    with pytest.raises(PlacementError, match="damaged"):
        TransferPlan.from_dict(data)
    with pytest.raises(PlacementError, match="not a transfer plan"):
        TransferPlan.from_dict({"layers": [{"layer_id": 0}]})
