"""Dispatch by the batch on real ranks: every rank solves alike and takes its part."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from equipoise import EpTopology
from equipoise.dispatch.dispatcher import ExpertDispatcher
from equipoise.dispatch.policy import DispatchPolicy
from equipoise.dispatch.scopes import gather_by_sum
from equipoise.dispatch.solver.assign import assign_slots
from equipoise.dispatch.solver.controls import ROTATION
from equipoise.dispatch.solver.quotas import solve_quotas
from equipoise.dispatch.tables import DispatchTables
from equipoise.distributed.communicator import TorchCommunicator
from helpers.dispatch_cases import placement
from helpers.run_ranks import run_ranks

TOPOLOGY = EpTopology(4, 2, 3)
TOKENS = (7, 0, 40, 13)  # by rank; one has none


def batch(step: int) -> list[torch.Tensor]:
    rng = np.random.default_rng(step)
    popularity = rng.dirichlet(np.full(9, 0.5))
    return [torch.from_numpy(rng.choice(np.arange(-1, 8), (tokens, 2), p=popularity)) for tokens in TOKENS]


def dispatch_on_rank(rank: int, _world_size: int, scope: str) -> list[list[Any]]:
    metadata = placement(TOPOLOGY, 8, np.random.default_rng(3))
    policy = DispatchPolicy("batch", scope)
    communicator = TorchCommunicator(dist.group.WORLD)
    gather = gather_by_sum(communicator, policy.ranks_of_scope(TOPOLOGY, rank))
    alone = ExpertDispatcher(metadata, rank=rank, policy=policy, gather=gather)
    sees_all = ExpertDispatcher(metadata, rank=rank, policy=policy)
    bounds = [0, *np.cumsum(TOKENS).tolist()]
    answers = []
    for step in range(3):
        ids = batch(step)
        slots = alone.dispatch(0, ids[rank])
        assert torch.equal(slots, sees_all.dispatch(0, torch.cat(ids), rank_bounds=bounds))
        alone.advance(TOKENS[rank])
        sees_all.advance(TOKENS[rank])
        answers.append(slots.tolist())
    return answers


@pytest.mark.parametrize("scope", ["rank", "node", "all"])
def test_gathered_counts_and_tokens_in_sight_give_one_answer_that_meets_the_quotas(scope: str) -> None:
    metadata = placement(TOPOLOGY, 8, np.random.default_rng(3))
    # Compiled here, once, and not on four ranks at the same time while they wait for each other.
    ExpertDispatcher(metadata, rank=0, policy=DispatchPolicy("batch")).dispatch(0, batch(0)[0])
    by_rank = run_ranks(dispatch_on_rank, TOPOLOGY.num_ranks, scope)
    tables, policy = DispatchTables(metadata).layer(0), DispatchPolicy("batch", scope)
    for step in range(3):
        ids = batch(step)
        for rank in range(TOPOLOGY.num_ranks):
            ranks = policy.ranks_of_scope(TOPOLOGY, rank)
            controls = torch.from_numpy(policy.controls(TOPOLOGY, rank, step=step))
            together = torch.cat([ids[r] for r in ranks])
            quotas = solve_quotas(torch.bincount(together[together >= 0], minlength=8), tables, controls)
            oracle = assign_slots(together, quotas, tables, int(controls[ROTATION]))
            first = sum(TOKENS[r] for r in ranks if r < rank)
            assert oracle[first : first + TOKENS[rank]].tolist() == by_rank[rank][step]
