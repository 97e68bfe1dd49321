"""The engine's answers stay transformers' own under every kind of dispatch, on real ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from equipoise import EpTopology
from equipoise.dispatch.dispatcher import ExpertDispatcher
from equipoise.dispatch.policy import DispatchPolicy
from helpers.dispatch_cases import placement
from helpers.engine_loop import PROMPTS, engine_greedy, plain_greedy, serve_config
from helpers.run_ranks import run_ranks

KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("static", {}),
    ("batch", {"ep_dispatch_scope": "rank"}),
    ("batch", {"ep_dispatch_scope": "node", "ep_dispatch_cross_node_cost": 0.2}),
    ("batch", {"ep_dispatch_scope": "all", "ep_dispatch_active_expert_cost": 4.0}),
)


def answers_on_ranks(rank: int, world_size: int, model: Path) -> list[object]:
    group = dist.new_group(list(range(world_size)))
    answers = []
    for algorithm, options in KINDS:
        config = serve_config(model, ep_size=world_size, redundant=4, nnodes=2, chunked_prefill_size=24)
        eplb = dataclasses.replace(config.eplb, ep_dispatch_algorithm=algorithm, **options)
        config = dataclasses.replace(config, eplb=eplb)
        answers.append(engine_greedy(config, PROMPTS, 5, rank=rank, group=group))
    return answers


def test_every_kind_of_dispatch_answers_like_transformers(tiny_model: Path) -> None:
    # Compiled here, once, and not on four ranks at the same time while they wait for each other.
    metadata = placement(EpTopology(4, 2, 3), 8, np.random.default_rng(0))
    ExpertDispatcher(metadata, rank=0, policy=DispatchPolicy("batch")).dispatch(0, torch.zeros(1, 2, dtype=torch.int64))
    expected = plain_greedy(tiny_model, PROMPTS, 5)
    answers = run_ranks(answers_on_ranks, 4, tiny_model, timeout=240)[0]
    for kind, answer in zip(KINDS, answers, strict=True):
        assert answer == expected, kind
