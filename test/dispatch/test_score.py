"""Scores: what they say of a batch is what dispatching that batch does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from equipoise import EpTopology, ExpertLocationMetadata, rebalance_experts
from equipoise.dispatch.dispatcher import ExpertDispatcher
from equipoise.dispatch.policy import DispatchPolicy
from equipoise.dispatch.score import DispatchScorer, counts_by_source, split_over_sources
from equipoise.errors import LoadError
from helpers.dispatch_cases import placement

TOPOLOGY = EpTopology(4, 2, 3)


@pytest.mark.parametrize("scope", ["rank", "node", "all"])
@pytest.mark.parametrize("cost", [0.0, 5.0])
def test_a_score_of_batch_is_what_dispatching_does(scope: str, cost: float) -> None:
    rng = np.random.default_rng(2)
    metadata = placement(TOPOLOGY, 8, rng)
    policy = DispatchPolicy("batch", scope, active_expert_cost=cost)
    topk = rng.choice(8, (80, 1, 2), p=rng.dirichlet(np.ones(8)))
    load = DispatchScorer(metadata, "batch", policy).step(counts_by_source(topk, 4, 8))
    by_rank = np.concatenate([topk[rank::4, 0] for rank in range(4)])
    bounds = [0, 20, 40, 60, 80]
    slots = torch.cat(
        [
            ExpertDispatcher(metadata, rank=rank, policy=policy).dispatch(
                0, torch.from_numpy(by_rank), rank_bounds=bounds
            )
            for rank in range(4)
        ]
    ).numpy()
    assert load.tokens[0].tolist() == np.bincount(slots.ravel() // 3, minlength=4).tolist()
    assert load.activated[0].tolist() == np.bincount(np.unique(slots) // 3, minlength=4).tolist()
    assert load.cost(cost)[0] == (load.tokens[0] + cost * load.activated[0]).max()


@pytest.mark.parametrize("scope", ["rank", "node", "all"])
@pytest.mark.parametrize("cost", [4.0, 16.0, 64.0, 295.0, 1000.0])
def test_batch_costs_no_more_than_planned_weights_at_any_price_of_an_activated_expert(scope: str, cost: float) -> None:
    rng, topology = np.random.default_rng(11), EpTopology(32, 4, 3)
    popularity = rng.dirichlet(np.full(64, 2.0), size=4)
    metadata = rebalance_experts(popularity * 1e6, topology, dispatch="batch", tokens_per_step=12288)
    policy = DispatchPolicy("batch", scope, active_expert_cost=cost)  # type: ignore[arg-type]
    batch, planned = DispatchScorer(metadata, "batch", policy), DispatchScorer(metadata, "weights")
    for tokens in (2, 8, 32, 64):
        steps = rng.multinomial(6 * tokens, popularity, size=(3, 32, 4))
        ours = [batch.step(counts, step=step).cost(cost) for step, counts in enumerate(steps)]
        theirs = [planned.step(counts).cost(cost) for counts in steps]
        assert np.mean(ours) <= np.mean(theirs), tokens


@pytest.mark.parametrize(("tokens", "replicas_opened"), [(1440, 8), (1600, 16)])
def test_ranks_that_see_their_own_tokens_alone_open_the_same_replicas(tokens: int, replicas_opened: int) -> None:
    """16 replicas of 8 experts: a second one opens for all ranks where an expert has tokens for it as a rule."""
    rng, topology = np.random.default_rng(5), EpTopology(8, 1, 2)
    metadata = ExpertLocationMetadata.from_physical_to_logical([[*range(8), *range(1, 8), 0]], 8, topology)
    policy = DispatchPolicy("batch", "rank", active_expert_cost=1000.0)
    load = DispatchScorer(metadata, "batch", policy).step(rng.multinomial(tokens, np.full(8, 1 / 8), size=(8, 1)))
    assert load.activated.sum() == replicas_opened


def test_on_one_node_scope_node_sees_all_and_opens_as_all_does() -> None:
    rng, topology = np.random.default_rng(6), EpTopology(8, 1, 4)
    metadata = placement(topology, 20, rng)
    node, everything = (
        DispatchScorer(metadata, "batch", DispatchPolicy("batch", scope, active_expert_cost=20.0))  # type: ignore[arg-type]
        for scope in ("node", "all")
    )
    for counts in rng.integers(0, 4, (5, 8, 1, 20)):
        assert node.step(counts).tokens.tolist() == everything.step(counts).tokens.tolist()


def test_where_reading_weights_is_all_that_counts_a_rank_opens_one_replica_of_an_expert() -> None:
    rng, topology = np.random.default_rng(11), EpTopology(32, 4, 3)
    popularity = rng.dirichlet(np.full(64, 2.0), size=8)
    metadata = rebalance_experts(popularity * 1e6, topology, dispatch="batch", tokens_per_step=192)
    policy = DispatchPolicy("batch", "rank", active_expert_cost=1000.0)
    counts = rng.multinomial(6, popularity, size=(32, 8))
    load = DispatchScorer(metadata, "batch", policy).step(counts)
    assert load.activated.sum(-1).tolist() == (counts.sum(0) > 0).sum(-1).tolist()


def test_static_and_planned_scores_keep_every_token() -> None:
    rng = np.random.default_rng(3)
    metadata = placement(TOPOLOGY, 8, rng)
    counts = split_over_sources(rng.integers(0, 50, (1, 8)), 4, rng)
    for kind in ("even", "static", "weights"):
        assert DispatchScorer(metadata, kind).step(counts).tokens.sum() == pytest.approx(counts.sum())  # type: ignore[arg-type]


def test_counts_that_cannot_be_scored_are_refused() -> None:
    scorer = DispatchScorer(placement(TOPOLOGY, 8, np.random.default_rng(0)))
    with pytest.raises(LoadError, match="counts must have shape"):
        scorer.step(np.zeros((3, 1, 8), dtype=np.int64))
    with pytest.raises(LoadError, match="whole tokens"):
        scorer.step(np.zeros((4, 1, 8)))
