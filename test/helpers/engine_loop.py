"""The engine's parts put together without its processes: greedy answers of one rank, and of plain transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from equipoise.config import EngineConfig, EplbConfig, ServeConfig
from equipoise.dispatch.dispatcher import ExpertDispatcher
from equipoise.dispatch.policy import DispatchPolicy
from equipoise.engine.model.blueprint import ModelBlueprint
from equipoise.engine.model.experts import EpContext
from equipoise.engine.model.runner import ModelRunner
from equipoise.engine.model.step_batch import StepBatch
from equipoise.engine.requests import GenerateRequest, SamplingParams
from equipoise.engine.scheduler import Outcome, Scheduler
from equipoise.engine.step_channel import StepChannel, StepInput

# Of different lengths: one token, some, and more than the window of the tiny gpt-oss.
PROMPTS = [[7], list(range(40, 52)), [5, 9, 200, 13] * 15, [30, 31, 32]]


def outcomes_of(batch: StepBatch, tokens: Sequence[int]) -> list[Outcome]:
    """One outcome per segment of a step, from the next tokens of its sampled segments."""
    drawn = dict(zip(batch.sampled, tokens, strict=True))
    return [Outcome(drawn.get(index), index in drawn) for index in range(len(batch.segments))]


def serve_config(model: Path, *, ep_size: int = 1, redundant: int = 0, **engine: object) -> ServeConfig:
    return ServeConfig(
        EngineConfig(str(model), ep_size=ep_size, device="cpu", **engine),  # type: ignore[arg-type]
        EplbConfig(ep_num_redundant_experts=redundant),
    )


def plain_greedy(model: Path, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """What ``generate`` of transformers answers, each prompt on its own, in one process."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    plain.generation_config.eos_token_id = None
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        made = plain.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0
        )
        answers.append(made[0, len(prompt) :].tolist())
    return answers


def engine_greedy(
    config: ServeConfig,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    rank: int = 0,
    group: dist.ProcessGroup | None = None,
) -> list[list[int]] | None:
    """All prompts together through scheduler, runner and experts of this rank; rank 0 returns the answers."""
    blueprint = ModelBlueprint.prepare(config)
    runner = ModelRunner(blueprint, rank, torch.device("cpu"), config)
    dispatcher = ExpertDispatcher(blueprint.metadata, rank=rank, policy=DispatchPolicy.from_config(config.eplb))

    def route(layer_id: int, topk_ids: torch.Tensor, rank_bounds: Sequence[int] | None) -> torch.Tensor:
        return dispatcher.dispatch(layer_id, topk_ids, rank_bounds=rank_bounds)

    runner.connect(EpContext(blueprint.topology, rank, group, route))
    channel = StepChannel(group, rank)
    if rank != 0:
        while not (plan := channel.receive()).stop:
            assert plan.batch is not None
            runner.forward(plan.batch)
        return None
    scheduler = Scheduler(
        num_rows=config.engine.max_running_requests,
        max_model_len=blueprint.max_model_len,
        step_tokens=config.engine.chunked_prefill_size,
        eos_token_ids=(),
        decode=lambda ids: "x" * len(ids),
    )
    answers: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    for i, prompt in enumerate(prompts):
        scheduler.add(GenerateRequest(str(i), tuple(prompt), SamplingParams(max_new_tokens=num_tokens)))
    while (batch := scheduler.next_batch()) is not None:
        channel.send(StepInput(batch))
        logits = runner.forward(batch)
        assert logits is not None
        for event in scheduler.complete(batch, outcomes_of(batch, logits.argmax(-1).tolist())):
            answers[event.rid] += event.token_ids
    channel.send(StepInput(stop=True))
    return list(answers.values())
