"""Minutes of everything at once: requests of all kinds, aborts and rebalances; every greedy answer stays right."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import pytest

from equipoise.config import EngineConfig, EplbConfig, ServeConfig
from equipoise.engine.engine import Engine
from equipoise.engine.requests import GenerateRequest, SamplingParams
from equipoise.errors import PhaseError
from equipoise.manager.commands import GetExpertLocation, GetStatus, Rebalance
from helpers.engine_loop import plain_greedy
from helpers.tiny_models import make_tiny_model

SECONDS = 60
CLIENTS = 10
NUM_TOKENS = 24


async def client(engine: Engine, number: int, prompts: list[list[int]], expected: list[list[int]], until: float) -> int:
    """One client after another request until the time is up; returns the answers that were compared."""
    chance = random.Random(number)
    compared = 0
    turn = 0
    while time.monotonic() < until:
        turn += 1
        which = chance.randrange(len(prompts))
        kind = chance.choice(["greedy", "greedy", "greedy", "sampled", "abort", "leave"])
        temperature = 1.0 if kind == "sampled" else 0.0
        params = SamplingParams(NUM_TOKENS, temperature=temperature, ignore_eos=True, seed=turn)
        request = GenerateRequest(f"{number}-{turn}", tuple(prompts[which]), params)
        tokens: list[int] = []
        stream = engine.generate(request)
        async for event in stream:
            tokens += event.token_ids
            if len(tokens) >= 5 and kind == "abort":
                await engine.abort(request.rid)
            if len(tokens) >= 5 and kind == "leave":
                await stream.aclose()
                break
        if kind == "sampled":
            assert len(tokens) == NUM_TOKENS
        else:
            assert tokens == expected[which][: len(tokens)]
            compared += kind == "greedy" and len(tokens) == NUM_TOKENS
    return compared


async def operator(engine: Engine, until: float) -> int:
    """Rebalances again and again; returns how often something moved."""
    chance = random.Random(0)
    committed = 0
    while time.monotonic() < until:
        algorithm = chance.choice((await engine.control(GetStatus())).available_algorithms)
        try:
            report = await engine.control(Rebalance(algorithm=algorithm, max_moves_per_layer=chance.choice([None, 3])))
        except PhaseError:  # a periodic one is under way
            await asyncio.sleep(0.1)
            continue
        assert report.error is None
        committed += report.outcome == "committed"
        location = await engine.control(GetExpertLocation())
        assert all(set(row) == set(range(location.num_logical_experts)) for row in location.physical_to_logical_map)
    return committed


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_answers_stay_right_whatever_happens(family: str, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", family, seed=2)
    chance = random.Random(family)
    prompts = [[chance.randrange(256) for _ in range(chance.randrange(1, 90))] for _ in range(12)]
    expected = plain_greedy(model, prompts, NUM_TOKENS)
    config = ServeConfig(
        EngineConfig(str(model), ep_size=4, nnodes=2, device="cpu", max_running_requests=6, chunked_prefill_size=32),
        EplbConfig(ep_num_redundant_experts=4, enable_eplb=True, eplb_rebalance_num_iterations=150),
    )
    engine = Engine.launch(config)

    async def run() -> list[int]:
        until = time.monotonic() + SECONDS
        clients = [client(engine, number, prompts, expected, until) for number in range(CLIENTS)]
        return await asyncio.gather(operator(engine, until), *clients)

    try:
        committed, *compared = asyncio.run(run())
    finally:
        engine.close()
    assert committed > 3
    assert all(count > 3 for count in compared)
