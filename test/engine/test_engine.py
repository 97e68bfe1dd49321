"""The engine with real processes: answers, streams, stops, rebalances while it serves, and dies in an orderly way."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from equipoise.config import EngineConfig, EplbConfig, ServeConfig
from equipoise.engine.engine import Engine
from equipoise.engine.requests import GenerateRequest, SamplingParams, TokenEvent
from equipoise.engine.step_log import GetSteps, GetStepTotals
from equipoise.errors import ConfigError, EngineDeadError, PhaseError
from equipoise.load.stream_report import RecordingReply
from equipoise.load.trace import LoadTrace
from equipoise.manager.commands import DumpRecording, GetStatus, Rebalance, StartRecording, StopRecording
from helpers.engine_loop import plain_greedy, serve_config
from helpers.tiny_models import make_tiny_model

PROMPTS = [[7], list(range(40, 52)), [5, 9, 200, 13] * 15, [30, 31, 32], [1, 2], [250] * 20]
NUM_TOKENS = 12
MAX_MODEL_LEN = 96


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "qwen3_moe", seed=5)


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    return plain_greedy(model, PROMPTS, NUM_TOKENS)


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    engine = Engine.launch(
        ServeConfig(
            EngineConfig(
                str(model), ep_size=4, nnodes=2, device="cpu", max_running_requests=4, max_model_len=MAX_MODEL_LEN,
                chunked_prefill_size=24,
            ),
            EplbConfig(ep_num_redundant_experts=4),
        )
    )  # fmt: skip
    yield engine
    engine.close()
    assert not any(alive(pid) for pid in engine.worker_pids)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


async def events_of(engine: Engine, rid: str, prompt: list[int], **sampling: Any) -> list[TokenEvent]:
    params = SamplingParams(**{"temperature": 0.0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True, **sampling})
    return [event async for event in engine.generate(GenerateRequest(rid, tuple(prompt), params))]


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


async def all_answers(engine: Engine, tag: str) -> list[list[int]]:
    streams = (events_of(engine, f"{tag}{i}", prompt) for i, prompt in enumerate(PROMPTS))
    return [tokens_of(events) for events in await asyncio.gather(*streams)]


class TestAnswers:
    def test_more_requests_than_rows_answer_like_transformers(self, engine: Engine, expected: list[list[int]]) -> None:
        assert asyncio.run(all_answers(engine, "a")) == expected

    def test_text_streams_token_by_token(self, engine: Engine, expected: list[list[int]]) -> None:
        events = asyncio.run(events_of(engine, "s", PROMPTS[1]))
        assert len(events) == NUM_TOKENS
        assert [event.finish_reason for event in events] == [None] * (NUM_TOKENS - 1) + ["length"]
        assert "".join(event.text_delta for event in events) == engine.tokenizer.decode(expected[1])

    def test_seed_decides_whatever_else_runs(self, engine: Engine) -> None:
        async def run() -> list[list[int]]:
            sampled = {"temperature": 1.0, "top_p": 0.95, "seed": 11}
            alone = await events_of(engine, "alone", PROMPTS[3], **sampled)
            both = await asyncio.gather(
                events_of(engine, "again", PROMPTS[3], **sampled),
                events_of(engine, "other", PROMPTS[3], **{**sampled, "seed": 12}),
                events_of(engine, "greedy", PROMPTS[2]),
            )
            return [tokens_of(events) for events in (alone, *both)]

        alone, again, other, greedy = asyncio.run(run())
        assert alone == again
        assert len({tuple(alone), tuple(other), tuple(greedy)}) == 3

    def test_stops(self, engine: Engine, expected: list[list[int]]) -> None:
        wanted = expected[3]
        cut = next(i for i, token in enumerate(wanted) if token not in wanted[:i] and i >= 2)
        events = asyncio.run(events_of(engine, "st", PROMPTS[3], stop_token_ids=(wanted[cut],)))
        assert tokens_of(events) == wanted[: cut + 1]
        assert events[-1].finish_reason == "stop"
        assert "".join(event.text_delta for event in events) == engine.tokenizer.decode(wanted[:cut])

    def test_an_answer_ends_where_the_context_does(self, engine: Engine) -> None:
        assert engine.max_model_len == MAX_MODEL_LEN
        prompt = [3] * (MAX_MODEL_LEN - 2)
        events = asyncio.run(events_of(engine, "long", prompt))
        assert (len(tokens_of(events)), events[-1].finish_reason) == (2, "length")

    def test_bad_requests_name_the_field(self, engine: Engine) -> None:
        for prompt in ([], [1] * MAX_MODEL_LEN, [1, engine.vocab_size], [-1], [True]):
            with pytest.raises(ConfigError) as caught:
                asyncio.run(events_of(engine, "bad", prompt))
            assert caught.value.field == "input_ids"

    def test_aborted_and_abandoned_requests_make_room(self, engine: Engine, expected: list[list[int]]) -> None:
        async def run() -> tuple[str | None, list[list[int]]]:
            slow = asyncio.create_task(events_of(engine, "slow", PROMPTS[0], max_new_tokens=90))
            for i in range(4):
                params = SamplingParams(90, temperature=0.0, ignore_eos=True)
                async for _ in (stream := engine.generate(GenerateRequest(f"left{i}", (1, 2), params))):
                    with pytest.raises(ConfigError, match="is running") as caught:
                        await anext(engine.generate(GenerateRequest(f"left{i}", (1, 2), params)))
                    assert caught.value.field == "rid"
                    break
                await stream.aclose()
            await engine.abort("slow")
            await engine.abort("nobody")
            return (await slow)[-1].finish_reason, await all_answers(engine, "after")

        assert asyncio.run(run()) == ("abort", expected)


class TestControl:
    def test_rebalances_while_it_answers(self, engine: Engine, expected: list[list[int]]) -> None:
        async def run() -> tuple[Any, list[list[list[int]]], list[list[int]]]:
            await all_answers(engine, "load")
            rebalance = asyncio.create_task(engine.control(Rebalance()))
            during = []
            while not rebalance.done():
                during.append(await all_answers(engine, f"during{len(during)}-"))
            return await rebalance, during, await all_answers(engine, "afterwards")

        report, during, afterwards = asyncio.run(run())
        assert report.outcome == "committed", report.error
        assert sum(report.moves) > 0
        assert all(answers == expected for answers in during)
        assert afterwards == expected
        steps = asyncio.run(engine.control(GetSteps()))
        assert {step.phase for step in steps} == {"collecting", "planning", "migrating"}
        assert all(step.seconds > 0 and step.num_tokens > 0 for step in steps)
        ids = [step.forward_pass_id for step in steps]
        assert ids == sorted(set(ids))
        assert [s.forward_pass_id for s in asyncio.run(engine.control(GetSteps(since=ids[-2])))] == ids[-2:]

    def test_rebalances_when_idle(self, engine: Engine, expected: list[list[int]]) -> None:
        async def run() -> Any:
            await events_of(engine, "skew", PROMPTS[5], max_new_tokens=40)
            await asyncio.sleep(0.2)
            return await asyncio.wait_for(engine.control(Rebalance()), 30), await all_answers(engine, "idle")

        report, answers = asyncio.run(run())
        assert report.outcome in ("committed", "skipped")
        assert answers == expected

    def test_errors_of_commands_come_back(self, engine: Engine) -> None:
        with pytest.raises(PhaseError):
            asyncio.run(engine.control(StopRecording()))
        assert asyncio.run(engine.control(StartRecording())) == RecordingReply(recording=True, stream=None)
        assert asyncio.run(engine.control(GetStatus())).recording
        asyncio.run(engine.control(StopRecording()))

    def test_idle_ranks_sleep(self, engine: Engine) -> None:
        def processor_seconds() -> float:
            fields = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in engine.worker_pids]
            return sum(int(field[11]) + int(field[12]) for field in fields) / os.sysconf("SC_CLK_TCK")

        if not Path("/proc/self/stat").exists():
            pytest.skip("needs /proc")
        before = processor_seconds()
        time.sleep(1.0)
        assert processor_seconds() - before < 0.2

    def test_each_rank_reads_its_share_of_the_weights(self, engine: Engine, model: Path) -> None:
        whole = (model / "model.safetensors").stat().st_size
        assert len(engine.weight_bytes) == 4
        assert all(read < 0.65 * whole for read in engine.weight_bytes)


def test_a_fresh_engine_has_seen_no_load_and_logs_what_its_rebalances_cost(
    model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = ServeConfig(EngineConfig(str(model), ep_size=2, device="cpu"), EplbConfig(eplb_profile=True))
    engine = Engine.launch(config)

    async def run() -> None:
        status = await engine.control(GetStatus())
        assert (status.window_steps, status.mean_balancedness) == (0, None), "warming up is no load"
        assert await engine.control(GetSteps()) == await engine.control(GetStepTotals()) == []
        await events_of(engine, "a", PROMPTS[0])
        status = await engine.control(GetStatus())
        # One token a step: it is one rank's, and every step counts.
        assert (status.window_steps, sum(status.rank_load[0])) == (NUM_TOKENS, 2 * NUM_TOKENS)
        (totals,) = await engine.control(GetStepTotals())
        assert (totals.num_steps, totals.num_tokens) == (NUM_TOKENS, NUM_TOKENS)
        assert (await engine.control(Rebalance(dry_run=True))).outcome in ("dry_run", "skipped")

    try:
        asyncio.run(asyncio.wait_for(run(), 60))
    finally:
        engine.close()
    log = capfd.readouterr().err
    assert " INFO rank 0 equipoise" in log
    assert "rebalance after step " in log
    assert "steps waited, in all" in log


def test_replicas_take_turns_from_step_to_step(model: Path, tmp_path: Path) -> None:
    engine = Engine.launch(
        ServeConfig(
            EngineConfig(str(model), ep_size=2, device="cpu"),
            EplbConfig(ep_num_redundant_experts=8, expert_distribution_recorder_mode="per_pass"),
        )
    )

    async def run() -> str:
        await engine.control(StartRecording())
        await events_of(engine, "a", [7], max_new_tokens=60, temperature=1.0, seed=1)
        return (await engine.control(DumpRecording(str(tmp_path)))).path

    try:
        trace = LoadTrace.open(asyncio.run(asyncio.wait_for(run(), 60)))
    finally:
        engine.close()
    assert trace.physical_count is not None
    seen = trace.physical_count.sum(axis=0).reshape(trace.num_layers, 2, 8)  # expert e lies in slots e and e + 8
    often = seen.sum(axis=1) >= 10
    assert often.any()
    assert (seen.min(axis=1)[often] > 0).all(), "one of two equal replicas had nothing to do"


class TestEnds:
    def test_a_dead_rank_fails_every_call_and_leaves_no_process(self, model: Path) -> None:
        engine = Engine.launch(serve_config(model, ep_size=2))

        async def run() -> None:
            stream = engine.generate(GenerateRequest("a", (1,), SamplingParams(500, temperature=0.0, ignore_eos=True)))
            await anext(stream)
            os.kill(engine.worker_pids[1], signal.SIGKILL)
            with pytest.raises(EngineDeadError, match="rank 1 has died: killed by SIGKILL"):
                async for _ in stream:
                    pass
            with pytest.raises(EngineDeadError, match="rank 1"):
                await engine.control(GetStatus())
            with pytest.raises(EngineDeadError, match="rank 1"):
                await anext(engine.generate(GenerateRequest("b", (1,))))

        try:
            asyncio.run(asyncio.wait_for(run(), 60))
            assert engine.error is not None
        finally:
            engine.close()
        assert wait_until(lambda: not any(alive(pid) for pid in engine.worker_pids))

    def test_ranks_end_with_the_launcher(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "torch.py").write_text("raise SystemExit('what lies in the current directory was imported')")
        program = (
            "import sys; from equipoise.config import *; from equipoise.engine.engine import Engine\n"
            "engine = Engine.launch(ServeConfig(EngineConfig(sys.argv[1], ep_size=2, device='cpu')))\n"
            "print(*engine.worker_pids, flush=True); sys.stdin.read()"
        )
        launcher = subprocess.Popen(
            [sys.executable, "-P", "-c", program, str(model)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path,
        )  # fmt: skip
        try:
            assert launcher.stdout is not None
            pids = [int(pid) for pid in launcher.stdout.readline().split()]
            assert len(pids) == 2
            assert all(alive(pid) for pid in pids)
        finally:
            launcher.kill()
            launcher.communicate()
        assert wait_until(lambda: not any(alive(pid) for pid in pids))

    def test_closing_while_it_starts_does_not_wait_for_the_ranks(self, model: Path) -> None:
        engine = Engine(serve_config(model, ep_size=2))
        time.sleep(0.3)  # in the middle of its imports
        began = time.monotonic()
        engine.close()
        assert time.monotonic() - began < 8
        assert engine._processes.supervisor.returncode is not None

    def test_a_bad_option_is_one_clear_error(self, model: Path, capfd: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(ConfigError, match="ep_num_redundant_experts=1 would do") as caught:
            Engine.launch(serve_config(model, ep_size=3))
        assert caught.value.field == "ep_num_redundant_experts"
        assert "Traceback" not in capfd.readouterr().err
