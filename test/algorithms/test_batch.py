"""Placements for dispatch that solves shares on each batch: judged by the best shares of batches not seen."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from equipoise.algorithms.rebalance import rebalance_experts
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology


def best_balance(load: np.ndarray, plan: ExpertLocationMetadata, layer: int) -> float:
    """Mean over maximum rank load of (E,) ``load`` with the best shares: a linear program, not the planner's solver."""
    placed = plan.physical_to_logical_map[layer].numpy()
    num_slots, ranks = len(placed), plan.topology.num_ranks
    cost = np.append(np.zeros(num_slots), 1.0)
    over = np.zeros((ranks, num_slots + 1))
    over[np.arange(num_slots) // plan.topology.slots_per_rank, np.arange(num_slots)] = 1.0
    over[:, -1] = -1.0
    whole = np.zeros((len(load), num_slots + 1))
    whole[placed, np.arange(num_slots)] = 1.0
    solved = linprog(cost, over, np.zeros(ranks), whole, load)
    assert solved.success
    return load.mean() * len(load) / ranks / solved.fun


def test_batches_not_seen_are_more_even_than_on_a_placement_made_for_weights() -> None:
    rng = np.random.default_rng(0)
    topology = EpTopology(16, 2, 5)
    share = rng.gamma(0.6, 1.0, (2, 64))
    share /= share.sum(1, keepdims=True)
    # Popularity of the moment: requests come in bursts.
    bursts = rng.gamma(4.0, 0.25, (10, 2, 64)) * share
    windows = rng.poisson(bursts / bursts.sum(2, keepdims=True) * 20_000).astype(float)
    current = rebalance_experts(windows[0], topology, algorithm="deepseek")
    means = {}
    for dispatch in ("weights", "batch"):
        options = {"dispatch": dispatch, "tokens_per_step": 20_000, "current": current}
        plan = rebalance_experts(windows[:6], topology, **options)  # type: ignore[arg-type]
        later = [best_balance(load, plan, layer) for late in windows[6:] for layer, load in enumerate(late)]
        means[dispatch] = np.mean(later)
        assert current.diff(plan).moves.sum() / 2 < 0.3 * topology.num_slots
    assert means["batch"] > means["weights"] + 0.01, means


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), limit=st.sampled_from([None, 0, 2]), kept=st.booleans())
def test_plans_are_valid_and_keep_the_limit(seed: int, limit: int | None, kept: bool) -> None:
    rng = np.random.default_rng(seed)
    topology = EpTopology(6, 2, 4)
    load = np.round(rng.gamma(0.6, 300.0, (2, 2, 16)))
    current = ExpertLocationMetadata.trivial(2, 16, topology) if kept else None
    plan = rebalance_experts(
        load, topology, dispatch="batch", tokens_per_step=500, current=current, max_moves_per_layer=limit
    )
    plan.check_integrity()
    if current is not None and limit is not None:
        assert current.diff(plan).slots_changed.max() <= limit
    by_rank = plan.physical_to_logical_map.view(2, 6, 4)
    assert current is not None or by_rank.sort(-1).values.diff(dim=-1).ne(0).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_experts_of_a_rank_that_is_gone_are_kept_alive(seed: int) -> None:
    rng = np.random.default_rng(seed)
    topology = EpTopology(6, 2, 4)
    load = np.round(rng.gamma(0.6, 300.0, (3, 2, 16)))
    current = ExpertLocationMetadata.trivial(2, 16, topology)
    gone = rng.integers(6)
    live = [rank for rank in range(6) if rank != gone]
    plan = rebalance_experts(load, topology, dispatch="batch", tokens_per_step=500, current=current, live_ranks=live)
    for placed in plan.physical_to_logical_map.view(2, 6, 4)[:, live].flatten(1):
        assert set(placed.tolist()) == set(range(16))
