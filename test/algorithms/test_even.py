"""Placements for hosts that split evenly: as good as the published planner's on that window, better on the next."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.algorithms.rebalance import rebalance_experts
from equipoise.placement.balancedness import balancedness
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), ranks=st.integers(1, 12), size=st.integers(1, 6), kept=st.booleans())
def test_weights_are_uniform_and_no_expert_is_lost(seed: int, ranks: int, size: int, kept: bool) -> None:
    rng = np.random.default_rng(seed)
    topology = EpTopology(ranks, 1, size)
    num_experts = int(rng.integers(1, topology.num_slots + 1))
    load = np.round(rng.gamma(0.6, 300.0, (2, 2, num_experts)))
    current = rebalance_experts(load[0], topology) if kept else None
    plan = rebalance_experts(load, topology, dispatch="even", current=current)
    plan.check_integrity()
    replicas = np.take_along_axis(plan.num_replicas.numpy(), plan.physical_to_logical_map.numpy(), axis=1)
    assert plan.dispatch_weights.numpy() == pytest.approx(1 / replicas)


@pytest.mark.parametrize("topology", [EpTopology(32, 4, 9), EpTopology(32, 4, 3), EpTopology(144, 18, 3)])
def test_never_below_the_published_planner_on_the_window_itself(topology: EpTopology) -> None:
    num_experts = topology.num_slots * 8 // 9
    load = np.random.default_rng(0).gamma(0.6, 300.0, (6, num_experts))
    even = balancedness(load, rebalance_experts(load, topology, dispatch="even"))
    published = balancedness(load, rebalance_experts(load, topology, algorithm="deepseek"))
    assert (even >= published - 1e-3).all()


def test_a_plan_with_weights_is_worse_for_a_host_that_splits_evenly() -> None:
    """The reason for the option: what was solved with weights, used without them."""
    topology = EpTopology(32, 4, 3)
    load = np.random.default_rng(1).gamma(0.6, 300.0, (6, 64))
    weighted = rebalance_experts(load, topology)
    used = ExpertLocationMetadata.from_physical_to_logical(weighted.physical_to_logical_map, 64, topology)
    even = rebalance_experts(load, topology, dispatch="even")
    assert balancedness(load, even).mean() > balancedness(load, used).mean() + 0.03


def test_moves_are_priced_and_the_next_window_gains() -> None:
    rng = np.random.default_rng(2)
    topology = EpTopology(16, 2, 4)
    share = rng.gamma(0.6, 1.0, (4, 48))
    windows = rng.poisson(share / share.sum(1, keepdims=True) * 20_000, (6, 4, 48)).astype(float)
    current = ExpertLocationMetadata.trivial(4, 48, topology)
    plan = rebalance_experts(windows[:4], topology, dispatch="even", current=current)
    assert balancedness(windows[5], plan).mean() > balancedness(windows[5], current).mean() + 0.1
    again = rebalance_experts(windows[1:5], topology, dispatch="even", current=plan)
    assert plan.diff(again).moves.sum() <= 4


def test_hot_experts_give_up_replicas_that_fit_nowhere() -> None:
    """FlashLB's example (vllm-ascend, pull request 3042): it reaches 1.13, counts of replicas by load alone 1.28."""
    load = np.array([[600.0, 560.0, 120.0, 120.0, 20.0, 10.0, 10.0, 10.0]])
    plan = rebalance_experts(load, EpTopology(8, 1, 2), dispatch="even")
    assert 1.0 / float(balancedness(load, plan)[0]) < 1.11
