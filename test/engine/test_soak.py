"""Minutes of everything at once: requests of all kinds, aborts and rebalances; every greedy answer stays right."""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from equipoise.config import EngineConfig, EplbConfig, ServeConfig
from equipoise.engine.engine import Engine
from equipoise.engine.requests import GenerateRequest, SamplingParams
from equipoise.errors import PhaseError
from equipoise.manager.commands import GetExpertLocation, GetStatus, Rebalance
from helpers.engine_loop import plain_greedy
from helpers.tiny_models import make_tiny_model

SECONDS = float(os.environ.get("SOAK_SECONDS", "540"))  # for each of the two families
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


def resident_bytes(pids: tuple[int, ...]) -> int:
    """Memory that is the processes' own, not shared with the supervisor they were forked from."""
    total = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += sum(
            1024 * int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty", "Private_Clean"))
        )
    return total


async def watch_memory(engine: Engine, until: float) -> tuple[int, int]:
    """Bytes after a third of the time, when caches have grown to their size, and at the end."""
    await asyncio.sleep((until - time.monotonic()) / 3)
    early = resident_bytes(engine.worker_pids)
    await asyncio.sleep(until - time.monotonic())
    return early, resident_bytes(engine.worker_pids)


@pytest.mark.soak
@pytest.mark.timeout(1500)
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

    async def run() -> list[Any]:
        until = time.monotonic() + SECONDS
        clients = [client(engine, number, prompts, expected, until) for number in range(CLIENTS)]
        return await asyncio.gather(watch_memory(engine, until), operator(engine, until), *clients)

    try:
        (early, late), committed, *compared = asyncio.run(run())
    finally:
        engine.close()
    assert late < 1.1 * early, f"memory grew from {early} to {late} bytes"
    assert committed > 3
    assert all(count > 3 for count in compared)
