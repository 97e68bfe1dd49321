"""What a move alone does to bits in bfloat16: equal batches, step by step, with and without one between two of them.

A product rounds by how many rows it has. Moving experts changes no bit where each expert has one slot, since its tokens
stay together; with replicas they are split anew, and so can round another way.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from equipoise.dispatch.dispatcher import ExpertDispatcher
from equipoise.distributed.communicator import TorchCommunicator
from equipoise.engine.model.blueprint import ModelBlueprint
from equipoise.engine.model.experts import EpContext
from equipoise.engine.model.runner import ModelRunner
from equipoise.engine.model.step_batch import Segment, StepBatch
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.transfer.execution.updater import ExpertLocationUpdater
from equipoise.transfer.planning.plan import plan_transfer
from helpers.engine_loop import serve_config
from helpers.migrate import migrate_layer
from helpers.run_ranks import run_ranks
from helpers.served_answers import Parting, parting_of
from helpers.tiny_models import make_tiny_model

ROWS, PROMPT, STEPS, MOVE_AFTER = 12, 6, 24, 8


def batches() -> list[StepBatch]:
    """A prompt for each row, then one token for each row a step: the same tokens whatever the model answers."""
    tokens = np.random.default_rng(0).integers(0, 256, (STEPS + 1, ROWS, PROMPT)).tolist()
    every = tuple(range(ROWS))
    prompts = tuple(token for row in tokens[0] for token in row)
    made = [StepBatch(tuple(Segment(row, 0, PROMPT) for row in every), prompts, every)]
    for step in range(STEPS):
        segments = tuple(Segment(row, PROMPT + step, 1) for row in every)
        made.append(StepBatch(segments, tuple(row[0] for row in tokens[1 + step]), every))
    return made


def logits_of_steps(rank: int, world_size: int, model: Path, dtype: str, redundant: int) -> list[list[torch.Tensor]]:
    """Rank 0: logits of each step without a move, and with one after step MOVE_AFTER."""
    group = dist.new_group(list(range(world_size)))
    config = serve_config(model, ep_size=world_size, redundant=redundant, dtype=dtype)
    found = []
    for move in (False, True):
        blueprint = ModelBlueprint.prepare(config)
        runner = ModelRunner(blueprint, rank, torch.device("cpu"), config)
        metadata, topology = blueprint.metadata, blueprint.topology
        dispatcher = ExpertDispatcher(metadata, rank=rank)

        def route(
            layer_id: int,
            topk_ids: torch.Tensor,
            rank_bounds: Sequence[int] | None,
            dispatcher: ExpertDispatcher = dispatcher,
        ) -> torch.Tensor:
            return dispatcher.dispatch(layer_id, topk_ids, rank_bounds=rank_bounds)

        runner.connect(EpContext(topology, rank, group, route))
        updater = ExpertLocationUpdater(TorchCommunicator(group), topology, runner.expert_weights())
        steps = []
        for number, batch in enumerate(batches()):
            logits = runner.forward(batch)
            steps.append(torch.empty(0) if logits is None else logits)
            if move and number == MOVE_AFTER:
                old = metadata.physical_to_logical_map
                new = ExpertLocationMetadata.from_physical_to_logical(
                    np.roll(old.numpy(), topology.slots_per_rank // 2 + 1, axis=1),
                    metadata.num_logical_experts,
                    topology,
                )
                for layer in plan_transfer(
                    metadata, new, topology, max_staged_experts=updater.max_staged_experts
                ).layers:
                    migrate_layer(updater, layer)
                layers = list(range(metadata.num_layers))
                metadata.update_layers_(new, layers)
                dispatcher.refresh(layers)
        found.append(steps)
    return found


def compare(model: Path, dtype: str, redundant: int) -> dict[str, Any]:
    plain, moved = run_ranks(logits_of_steps, 2, model, dtype, redundant, timeout=200)[0]
    before = all(torch.equal(a, b) for a, b in zip(plain[: MOVE_AFTER + 1], moved[: MOVE_AFTER + 1], strict=True))
    a, b = torch.cat(plain[MOVE_AFTER + 1 :]), torch.cat(moved[MOVE_AFTER + 1 :])
    parted = a.argmax(-1) != b.argmax(-1)
    best = a.topk(2, dim=-1).values
    margins = (best[:, 0] - best[:, 1])[parted]
    return {
        "equal before": before,
        "logits": len(a),
        "same bits": int((a == b).all(-1).sum()),
        "largest difference": float((a - b).abs().max()),
        "other best token": int(parted.sum()),
        "margin where they part": float(margins.max()) if len(margins) else 0.0,
        "median margin": float((best[:, 0] - best[:, 1]).median()),
    }


@pytest.mark.parametrize("redundant", [0, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_move_alone(dtype: str, redundant: int, tmp_path: Path, record_property: Any) -> None:
    # Three choices of a token: the sum of two is the same in either order, and could not tell by what it was ordered.
    sizes = {"hidden_size": 128, "moe_intermediate_size": 96, "num_experts_per_tok": 3}
    model = make_tiny_model(tmp_path / "m", "qwen3_moe", seed=4, **sizes)
    found = compare(model, dtype, redundant)
    for name, figure in found.items():
        record_property(name, figure)
    assert found["equal before"]
    if redundant == 0:
        assert found["same bits"] == found["logits"]
    if dtype == "float32":
        assert found["other best token"] == 0


def test_where_answers_part_and_how_near_a_tie_it_was() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.5, 1.75], [9.0, 1.0, 1.0]])
    assert parting_of(logits, [1, 0, 0]) is None
    assert parting_of(logits, [1, 2, 1]) == Parting(1, 0.25)
