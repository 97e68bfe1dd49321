"""Load windows of one phase in the real engine: what two ranks count is what their requests prefilled or decoded."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from equipoise.config import EngineConfig, EplbConfig, LoadPhase, ServeConfig
from equipoise.distributed.in_memory import InMemoryHub
from equipoise.engine.engine import Engine
from equipoise.engine.requests import GenerateRequest, SamplingParams
from equipoise.engine.step_log import GetSteps
from equipoise.errors import ConfigError
from equipoise.load.trace import LoadTrace
from equipoise.manager.commands import DumpRecording, GetStatus, Rebalance, StartRecording
from equipoise.manager.manager import EplbManager
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology

TOP_K, FIRST, SECOND = 2, (40,) * 5, tuple(range(50, 57))


@pytest.mark.parametrize(("load_phase", "tokens"), [("decode", 39 + 9), ("prefill", 5 + 7)])
def test_the_window_holds_the_tokens_that_requests_prefilled_or_decoded(
    tiny_model: Path, tmp_path: Path, load_phase: LoadPhase, tokens: int
) -> None:
    engine = Engine.launch(
        ServeConfig(EngineConfig(str(tiny_model), ep_size=2, device="cpu"), EplbConfig(eplb_load_phase=load_phase))
    )

    async def answer(rid: str, prompt: tuple[int, ...], num_tokens: int, started: asyncio.Event | None = None) -> None:
        sampling = SamplingParams(num_tokens, temperature=0.0, ignore_eos=True)
        async for _ in engine.generate(GenerateRequest(rid, prompt, sampling)):
            if started is not None:
                started.set()

    async def run() -> tuple[Any, list[Any], str]:
        await engine.control(StartRecording())
        started = asyncio.Event()
        first = asyncio.create_task(answer("a", FIRST, 40, started))
        await started.wait()
        await answer("b", SECOND, 10)
        await first
        status = await engine.control(GetStatus())
        assert (await engine.control(Rebalance(dry_run=True))).outcome in ("dry_run", "skipped")
        return status, await engine.control(GetSteps()), (await engine.control(DumpRecording(str(tmp_path)))).path

    try:
        status, steps, dump = asyncio.run(asyncio.wait_for(run(), 60))
    finally:
        engine.close()
    sizes = [step.num_tokens for step in steps]
    assert len(SECOND) + 1 in sizes, "no step held a prompt and a decoded token"
    assert status.load_phase == load_phase
    assert [sum(row) for row in status.rank_load] == [TOP_K * tokens] * status.num_layers
    with_prompt = sum(size >= len(FIRST) for size in sizes)
    assert status.window_steps == (with_prompt if load_phase == "prefill" else len(sizes) - 1)
    recorded = LoadTrace.open(dump).logical_count.sum(axis=(0, 2)).tolist()
    assert recorded == [TOP_K * sum(sizes)] * status.num_layers, "a recording takes the tokens of both"


def test_a_host_that_tells_no_phases_is_refused() -> None:
    metadata = ExpertLocationMetadata.trivial(1, 4, EpTopology(1, 1, 4), max_replicas=1)
    with pytest.raises(ConfigError, match="eplb_load_phase must be 'all' in a host that does not tell phases"):
        EplbManager(EplbConfig(eplb_load_phase="decode"), [], metadata, InMemoryHub(1).communicator(0))
