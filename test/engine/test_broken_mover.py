"""The proof can fail: with a mover that changes maps and leaves the weights, greedy answers differ.

Two ranks of the real engine, in processes in which the updater can be broken on purpose.
"""

from __future__ import annotations

import tempfile
import threading
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from equipoise.config import EngineConfig, EplbConfig, ServeConfig
from equipoise.engine.messages import Control, Ready, Reply, Stop, Submit, Tokens
from equipoise.engine.model.blueprint import ModelBlueprint
from equipoise.engine.requests import GenerateRequest, SamplingParams
from equipoise.engine.worker import RankWorker
from equipoise.manager.commands import Rebalance
from equipoise.manager.reports import RebalanceReport
from equipoise.transfer.execution.stream import CommitTimer
from equipoise.transfer.execution.updater import CommittedBatch, ExpertLocationUpdater, StagedBatch
from helpers.run_ranks import run_ranks
from helpers.tiny_models import make_tiny_model

PROMPTS = [tuple(range(7, 27)), tuple(range(90, 60, -1)), (5, 5, 7, 200)]
NEW_TOKENS = 12


def next_of(pipe: Connection, kind: type) -> Any:
    while True:
        assert pipe.poll(60), f"no {kind.__name__} within a minute"
        message = pipe.recv()
        if isinstance(message, kind):
            return message


def answers(pipe: Connection, name: str) -> list[tuple[int, ...]]:
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    for number, prompt in enumerate(PROMPTS):
        pipe.send(Submit(GenerateRequest(f"{name}-{number}", prompt, sampling)))
    found: dict[str, list[int]] = {f"{name}-{number}": [] for number in range(len(PROMPTS))}
    finished = 0
    while finished < len(PROMPTS):
        for event in next_of(pipe, Tokens).events:
            found[event.rid] += event.token_ids
            finished += event.finish_reason is not None
    return [tuple(tokens) for tokens in found.values()]


def converse(pipe: Connection, said: dict[str, Any]) -> None:
    try:
        next_of(pipe, Ready)
        said["before"] = answers(pipe, "before")
        pipe.send(Control(0, Rebalance(algorithm="deepseek")))
        said["report"] = next_of(pipe, Reply).value
        said["after"] = answers(pipe, "after")
    finally:
        pipe.send(Stop())


def commit_nothing(_updater: ExpertLocationUpdater, staged: StagedBatch) -> CommittedBatch:
    return CommittedBatch(staged, CommitTimer(time.perf_counter))


def serve(rank: int, world_size: int, directory: str, rendezvous: str, broken: bool) -> dict[str, Any]:
    if broken:
        ExpertLocationUpdater.commit = commit_nothing  # type: ignore[method-assign]
    dist.destroy_process_group()  # the worker makes its own
    config = ServeConfig(
        EngineConfig(model_path=directory, ep_size=world_size, max_model_len=128),
        EplbConfig(ep_num_redundant_experts=4),
    )
    said: dict[str, Any] = {}
    mine, theirs = Pipe() if rank == 0 else (None, None)
    client = threading.Thread(target=converse, args=(mine, said)) if rank == 0 else None
    if client is not None:
        client.start()
    RankWorker(config, ModelBlueprint.prepare(config), rank, Path(rendezvous), theirs).run()
    if client is not None:
        client.join(30)
    return said


def plain_answers(directory: Path) -> list[tuple[int, ...]]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        for _ in range(NEW_TOKENS):
            with torch.inference_mode():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        found.append(tuple(ids[0, len(prompt) :].tolist()))
    return found


@pytest.mark.parametrize("broken", [False, True], ids=["whole", "broken"])
def test_a_mover_that_leaves_the_weights_is_found_out(tmp_path: Path, broken: bool) -> None:
    directory = make_tiny_model(tmp_path / "model")
    with tempfile.TemporaryDirectory() as rendezvous:
        said = run_ranks(serve, 2, str(directory), rendezvous, broken)[0]
    report = said["report"]
    assert isinstance(report, RebalanceReport)
    assert (report.outcome, sum(report.moves) > 0) == ("committed", True)
    expected = plain_answers(directory)
    assert said["before"] == expected
    assert (said["after"] == expected) is not broken
