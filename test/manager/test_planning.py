"""What a rebalance is planned to be, from load windows and the placement in force."""

from __future__ import annotations

import numpy as np
import pytest

from equipoise.algorithms.rebalance import rebalance_experts
from equipoise.config import EplbConfig
from equipoise.manager import planning
from equipoise.manager.commands import Rebalance
from equipoise.manager.planning import Migrate, Plan, Reweight, Skip, plan_rebalance
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology

TOPOLOGY = EpTopology(8, 2, 3)
EXPERTS = 16


def plan(
    current: ExpertLocationMetadata,
    algorithm: str,
    num_groups: int | None,
    *,
    max_staged_experts: int | None = 2,
    force: bool = True,
    load: np.ndarray | None = None,
) -> Plan:
    if load is None:
        load = np.random.default_rng(3).zipf(1.5, (1, 2, EXPERTS)).clip(max=500) * 10
    return plan_rebalance(
        load,
        current,
        EplbConfig(),
        algorithm=algorithm,
        request=Rebalance(algorithm=algorithm, force=force),
        window_steps=5,
        num_groups=num_groups,
        max_staged_experts=max_staged_experts,
        clock=lambda: 0.0,
    )


def reached(current: ExpertLocationMetadata, algorithm: str, num_groups: int | None) -> ExpertLocationMetadata:
    planned = plan(current, algorithm, num_groups)
    assert isinstance(planned, Migrate)
    return planned.placement(current)


def renamed(placement: ExpertLocationMetadata, rank_order: list[int]) -> ExpertLocationMetadata:
    ranks = placement.physical_to_logical_map.numpy().reshape(placement.num_layers, TOPOLOGY.num_ranks, -1)
    return ExpertLocationMetadata.from_physical_to_logical(
        ranks[:, rank_order].reshape(placement.num_layers, -1), EXPERTS, TOPOLOGY
    )


@pytest.mark.parametrize(
    ("algorithm", "num_groups", "rank_order", "moves"),
    [
        ("deepseek", None, [4, 0, 6, 1, 5, 3, 2, 7], False),
        ("deepseek_hierarchical", 4, [5, 4, 7, 6, 1, 0, 3, 2], False),  # nodes swapped, and ranks within them
        ("deepseek_hierarchical", 4, [4, 1, 2, 3, 0, 5, 6, 7], True),  # groups would share a node no longer
    ],
)
def test_other_names_for_the_same_placement_move_nothing_where_names_mean_nothing(
    algorithm, num_groups, rank_order, moves
):
    start = ExpertLocationMetadata.trivial(2, EXPERTS, TOPOLOGY)
    planned = reached(start, algorithm, num_groups)
    again = plan(renamed(planned, rank_order), algorithm, num_groups)
    assert isinstance(again, Migrate) is moves


def test_a_step_stages_no_more_than_there_is_room_for():
    planned = plan(ExpertLocationMetadata.trivial(2, EXPERTS, TOPOLOGY), "deepseek", None)
    assert isinstance(planned, Migrate)
    assert planned.transfer is not None
    for layer in planned.transfer.layers:
        for batch in layer.batches:
            received = [TOPOLOGY.rank_of_slot(transfer.destination_slot) for transfer in batch.transfers]
            assert max((received.count(rank) for rank in set(received)), default=0) <= 2


def test_without_load_nothing_is_planned():
    current = ExpertLocationMetadata.trivial(2, EXPERTS, TOPOLOGY)
    nothing = plan_rebalance(
        np.zeros((0, 2, EXPERTS), dtype=np.int64),
        current,
        EplbConfig(),
        algorithm="deepseek",
        request=Rebalance(force=True),
        window_steps=0,
        num_groups=None,
        max_staged_experts=2,
        clock=lambda: 0.0,
    )
    assert isinstance(nothing, Skip)
    assert nothing.balancedness_before == [None, None]


def test_a_host_that_moves_experts_itself_gets_no_transfer_plan():
    current = ExpertLocationMetadata.trivial(2, EXPERTS, TOPOLOGY)
    planned = plan(current, "deepseek", None, max_staged_experts=None)
    assert isinstance(planned, Migrate)
    assert planned.transfer is None
    assert planned.diff.slots_changed.sum() > 0


def test_new_weights_alone_are_a_reweight():
    current = ExpertLocationMetadata.trivial(2, EXPERTS, TOPOLOGY)
    load = np.full((1, 2, EXPERTS), 1000)
    load[..., 6:9] = 3000, 3000, 5000  # on one rank; the first two have replicas on another one
    planned = plan(current, "reweight", None, load=load)
    assert isinstance(planned, Reweight)
    placement = planned.placement(current)
    assert placement.physical_to_logical_map.equal(current.physical_to_logical_map)
    assert not placement.dispatch_weights.equal(current.dispatch_weights)


def test_a_plan_that_gains_nothing_is_skipped_and_says_what_it_would_have_changed():
    current = reached(ExpertLocationMetadata.trivial(2, EXPERTS, TOPOLOGY), "deepseek", None)
    kept = plan(current, "deepseek", None, force=False)
    assert isinstance(kept, Skip)
    assert "->" in kept.reason


@pytest.mark.parametrize("dispatch", ["even", "batch"])
def test_a_plan_is_made_for_the_dispatch_there_is_and_for_batches_of_the_size_there_was(dispatch, monkeypatch):
    asked = []

    def rebalance(load, topology, **options):
        asked.append(options)
        return rebalance_experts(load, topology, **options)

    monkeypatch.setattr(planning, "rebalance_experts", rebalance)
    windows = np.zeros((2, 3, EXPERTS), dtype=np.int64)
    windows[:, :2] = np.random.default_rng(0).multinomial(2000, np.arange(1, 17) / 136, (2, 2))  # the third counts none
    plan_rebalance(
        windows,
        ExpertLocationMetadata.trivial(3, EXPERTS, TOPOLOGY),
        EplbConfig(),
        algorithm="auto",
        request=None,
        window_steps=5,
        num_groups=None,
        max_staged_experts=2,
        clock=lambda: 0.0,
        dispatch=dispatch,
    )
    assert [(options["dispatch"], options["tokens_per_step"]) for options in asked] == [(dispatch, 800)]
