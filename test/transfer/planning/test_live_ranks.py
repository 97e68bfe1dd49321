"""Plans among the ranks that live: a dead one neither sends nor receives, and is no reason to lose an expert."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.algorithms.rebalance import rebalance_experts
from equipoise.dispatch.dispatcher import ExpertDispatcher
from equipoise.dispatch.policy import DispatchPolicy
from equipoise.errors import ConfigError, PlacementError
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology
from equipoise.transfer.planning.plan import plan_transfer
from equipoise.transfer.planning.rank_program import rank_program
from helpers.plan_simulator import commit, run_round


@st.composite
def transitions(draw):
    """(topology, live ranks, old map, new map, staging budget); live ranks hold every expert, before and after."""
    num_nodes, ranks_per_node = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    topology = EpTopology(num_nodes * ranks_per_node, num_nodes, draw(st.integers(1, 4)))
    ranks = range(topology.num_ranks)
    live = sorted(draw(st.sets(st.sampled_from(list(ranks)), min_size=1)))
    num_experts = draw(st.integers(1, len(live) * topology.slots_per_rank))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))

    def placement():
        slot_map = rng.integers(0, num_experts, topology.num_slots)
        on_live = rng.permutation([slot for rank in live for slot in topology.slots_of_rank(rank)])
        slot_map[on_live[:num_experts]] = np.arange(num_experts)
        return slot_map[None]

    return topology, live, placement(), placement(), draw(st.integers(1, 4)), num_experts


@settings(max_examples=150, deadline=None)
@given(transitions())
def test_live_ranks_reach_the_new_map_among_themselves(case):
    topology, live, old, new, budget, num_experts = case
    plan = plan_transfer(
        old, new, topology, num_logical_experts=num_experts, max_staged_experts=budget, live_ranks=live
    )
    slots = old.reshape(topology.num_ranks, -1).astype(np.int64).copy()
    for batch in (batch for layer in plan.layers for batch in layer.batches):
        programs = {rank: rank_program(batch, rank, topology) for rank in live}
        staged = {rank: np.full(program.num_staging_slots, -1) for rank, program in programs.items()}
        for transfer in batch.transfers:
            assert {topology.rank_of_slot(transfer.source_slot), topology.rank_of_slot(transfer.destination_slot)} <= {
                *live
            }
        for index in range(batch.num_rounds):
            landed = [(rank, run_round(index, rank, programs, slots, staged)) for rank in live]
            for rank, arrival in landed:
                if arrival is not None:
                    staged[rank][arrival[1]] = arrival[2]
        for rank in live:
            assert programs[rank].num_staging_slots <= max(1, min(budget, topology.slots_per_rank))
            commit(programs[rank], slots[rank], staged[rank])
            expected = batch.new_map.reshape(topology.num_ranks, -1)[rank]
            assert slots[rank].tolist() == expected.tolist()
        held = {int(expert) for rank in live for expert in slots[rank]}
        assert held == set(range(num_experts)), "live ranks hold every expert after each batch"
    assert all(slots[rank].tolist() == new.reshape(topology.num_ranks, -1)[rank].tolist() for rank in live)


@settings(max_examples=40, deadline=None)
@given(transitions(), st.integers(0, 2**32))
def test_planner_transfer_and_dispatch_honour_one_value(case, seed):
    topology, live, old, _, budget, num_experts = case
    current = ExpertLocationMetadata.from_physical_to_logical(old, num_experts, topology)
    load = np.random.default_rng(seed).integers(0, 1000, (2, 1, num_experts))
    planned = rebalance_experts(load, topology, current=current, live_ranks=live)
    plan = plan_transfer(current, planned, topology, max_staged_experts=budget, live_ranks=live)
    for transfer in (t for layer in plan.layers for batch in layer.batches for t in batch.transfers):
        ends = {topology.rank_of_slot(transfer.source_slot), topology.rank_of_slot(transfer.destination_slot)}
        assert ends <= set(live)
    on_live = {slot for rank in live for slot in topology.slots_of_rank(rank)}
    tokens = torch.arange(num_experts).repeat(50)[:, None]
    for algorithm in ("static", "dynamic", "batch"):
        dispatcher = ExpertDispatcher(planned, rank=live[0], policy=DispatchPolicy(algorithm), live_ranks=live)
        slots = dispatcher.dispatch(0, tokens)
        assert set(slots.flatten().tolist()) <= on_live
        assert torch.equal(planned.physical_to_logical_map[0][slots], tokens)


def test_planners_of_whole_clusters_say_that_they_are():
    topology = EpTopology(3, 1, 2)
    for algorithm in ("deepseek", "deepseek_hierarchical"):
        with pytest.raises(
            ConfigError, match=r"ranks of one speed that are all there, got rank_capacity=\[1.0, 0.0, 1"
        ):
            rebalance_experts(np.ones((1, 4)), topology, algorithm=algorithm, live_ranks=[0, 2])
    with pytest.raises(ConfigError, match=r"5 logical experts do not fit into the 4 slots of the 2 ranks") as caught:
        rebalance_experts(np.ones((1, 5)), topology, live_ranks=[0, 2])
    assert caught.value.field == "live_ranks"


def test_all_ranks_alive_is_the_default():
    topology = EpTopology(4, 2, 2)
    old, new = np.arange(8)[None], np.roll(np.arange(8), 2)[None]
    assert plan_transfer(old, new, topology, live_ranks=range(4)).digest == plan_transfer(old, new, topology).digest


def test_an_expert_whose_only_copy_is_gone_is_named():
    topology = EpTopology(3, 1, 2)
    old, new = [[0, 1, 2, 3, 0, 1]], [[0, 1, 2, 3, 2, 3]]
    with pytest.raises(PlacementError, match=r"old has no slot for expert 2 in layer 0 on a live rank \(ranks \[1\]"):
        plan_transfer(old, new, topology, live_ranks=[0, 2])
    with pytest.raises(PlacementError, match=r"new has no slot for expert 0 in layer 0 on a live rank \(ranks \[0\]"):
        plan_transfer(old, new, topology, live_ranks=[1, 2])


@pytest.mark.parametrize("live", [[], [0, 3], [-1]])
def test_live_ranks_that_cannot_be_are_refused(live):
    with pytest.raises(ConfigError, match=r"live_ranks must be some of 0 to 2"):
        plan_transfer([[0, 1, 2]], [[1, 2, 0]], EpTopology(3, 1, 1), live_ranks=live)


def test_the_worked_example_of_assign_sources():
    topology = EpTopology(4, 2, 2)
    plan = plan_transfer([[0, 1, 2, 3, 4, 5, 4, 5]], [[0, 2, 0, 3, 1, 4, 1, 5]], topology)
    transfers = plan.layers[0].batches[0].transfers
    ranks = {(t.expert, topology.rank_of_slot(t.source_slot), topology.rank_of_slot(t.destination_slot), t.relayed)
             for t in transfers}  # fmt: skip
    assert ranks == {(0, 0, 1, 0), (1, 0, 2, 0), (1, 2, 3, 1), (2, 1, 0, 0)}
