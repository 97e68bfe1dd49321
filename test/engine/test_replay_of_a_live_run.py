"""Replay of a live run's own recording says what the live run measured, for every kind of dispatch."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from equipoise.config import EngineConfig, EplbConfig, ServeConfig
from equipoise.engine import demo_model
from equipoise.engine.engine import Engine
from equipoise.engine.requests import GenerateRequest, SamplingParams
from equipoise.load.trace import LoadTrace
from equipoise.manager.commands import DumpRecording, GetStatus, StartRecording
from equipoise.placement.balancedness import balancedness_of_rank_load
from equipoise.replay.costs import CostModel
from equipoise.replay.live import LiveSettings, replay_live
from equipoise.topology import EpTopology

RANKS, INTERVAL, REQUESTS, AT_ONCE, ANSWER = 4, 48, 150, 12, 12
TOPOLOGY = EpTopology(RANKS, 2, 10)  # the demo model's 32 experts, and 8 redundant ones


async def record(engine: Engine, folder: Path) -> LoadTrace:
    """Serves requests while the engine rebalances by itself; what it counted."""
    while (await engine.control(GetStatus())).compiling:  # else the first plan waits for a compiler
        await asyncio.sleep(0.2)
    await engine.control(StartRecording())
    texts = demo_model.prompts()["code"]
    places = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        prompt = tuple(engine.tokenizer.encode(texts[number % len(texts)]))
        sampling = SamplingParams(ANSWER, temperature=1.0, seed=number, ignore_eos=True)
        async with places:
            async for _ in engine.generate(GenerateRequest(f"r{number}", prompt, sampling)):
                pass

    await asyncio.gather(*(one(number) for number in range(REQUESTS)))
    status = await engine.control(GetStatus())
    assert status.totals.by_outcome["committed"] >= 1, status.last_report
    dump = await engine.control(DumpRecording(str(folder)))
    assert dump is not None
    return LoadTrace.open(dump.path)


def live_map_is(trace: LoadTrace, step: int, physical_to_logical_map: np.ndarray) -> bool:
    """Whether counts of slots add up to those of experts, with this map."""
    assert trace.physical_count is not None
    logical = np.zeros_like(trace.logical_count[step])
    np.add.at(logical, (np.arange(len(logical))[:, None], physical_to_logical_map), trace.physical_count[step])
    return np.array_equal(logical, trace.logical_count[step])


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("live", "scope", "replayed"),
    [
        ("static", "rank", "static"),
        ("dynamic", "rank", "weights"),
        ("batch", "rank", "batch"),
        ("batch", "node", "batch"),
        ("batch", "all", "batch"),
    ],
)
def test_replay_predicts_what_the_live_run_measured(live: str, scope: str, replayed: str, tmp_path: Path) -> None:
    eplb = EplbConfig(
        enable_eplb=True, ep_num_redundant_experts=8, eplb_rebalance_num_iterations=INTERVAL,
        ep_dispatch_algorithm=live, ep_dispatch_scope=scope, expert_distribution_recorder_mode="per_pass",
    )  # fmt: skip
    engine = Engine.launch(ServeConfig(EngineConfig("demo", ep_size=RANKS, nnodes=2, device="cpu"), eplb))
    try:
        trace = asyncio.run(asyncio.wait_for(record(engine, tmp_path), 200))
    finally:
        engine.close()
    assert trace.physical_count is not None
    per_rank = trace.physical_count.reshape(trace.num_steps, trace.num_layers, RANKS, -1).sum(-1)
    measured = balancedness_of_rank_load(per_rank.astype(np.float64))

    costs = CostModel.named("h100", "qwen3-30b")
    settings = LiveSettings(
        "equipoise", interval=INTERVAL, dispatch=replayed, dispatch_scope=scope, active_expert_cost=0.0
    )
    counted = LoadTrace(trace.logical_count, metadata={"top_k": 4})  # as it would be without physical counts
    predicted = replay_live(counted, TOPOLOGY, settings, costs)
    print(f"live {live} {scope}: measured {np.nanmean(measured):.4f}, predicted {predicted.mean_balancedness:.4f}")
    assert predicted.mean_balancedness == pytest.approx(np.nanmean(measured), abs=0.02)

    # Up to the second plan, the replay has moved what the live run has moved.
    until = predicted.plans[1].step - 1
    first = replay_live(counted.take(slice(0, until)), TOPOLOGY, settings, costs).final_placement
    assert first is not None
    assert live_map_is(trace, until - 1, first.physical_to_logical_map.numpy())
