"""Answers of a running engine before, during and after a forced rebalance, and where they part from transformers'."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from equipoise.engine.engine import Engine
from equipoise.engine.requests import GenerateRequest, SamplingParams
from equipoise.manager.commands import GetExpertLocation, Rebalance
from helpers.engine_loop import PROMPTS


async def answer(engine: Engine, rid: str, prompt: Sequence[int], num_tokens: int) -> list[int]:
    params = SamplingParams(num_tokens, temperature=0.0, ignore_eos=True)
    tokens: list[int] = []
    async for event in engine.generate(GenerateRequest(rid, tuple(prompt), params)):
        tokens += event.token_ids
    return tokens


async def before_during_after(
    engine: Engine, num_tokens: int, prompts: Sequence[Sequence[int]] = PROMPTS
) -> tuple[list[list[list[int]]], int]:
    """Answers to all prompts, three times, and the slots that moved."""

    async def ask(when: str) -> list[list[int]]:
        answers = [answer(engine, f"{when}{i}", prompt, num_tokens) for i, prompt in enumerate(prompts)]
        return list(await asyncio.gather(*answers))

    old = await engine.control(GetExpertLocation())
    before = await ask("before")
    during, report = await asyncio.gather(ask("during"), engine.control(Rebalance("deepseek", force=True)))
    assert report.outcome == "committed", report.reason
    new = await engine.control(GetExpertLocation())
    assert new.physical_to_logical_map != old.physical_to_logical_map
    return [before, during, await ask("after")], sum(report.moves)


@dataclass(frozen=True)
class Parting:
    """The first token of an answer that is not the reference's likeliest."""

    position: int  # in the answer
    margin: float  # between the logits of the reference's two likeliest tokens there


def parting_of(logits: torch.Tensor, tokens: Sequence[int]) -> Parting | None:
    """Where ``tokens`` part from the likeliest ones of ``logits`` (N, V), the reference's for these very tokens."""
    best = logits.float().topk(2, dim=-1)
    other = (best.indices[:, 0] != torch.tensor(tokens, device=logits.device)).nonzero().flatten().tolist()
    if not other:
        return None
    return Parting(other[0], float(best.values[other[0], 0] - best.values[other[0], 1]))
