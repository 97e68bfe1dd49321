"""A rank that is stopped or dies is noticed: by the launcher's pulse at once, by the watchdog for good."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from equipoise.config import EngineConfig, ServeConfig
from equipoise.engine.engine import Engine
from equipoise.engine.processes import PING_SECONDS, Pulse
from equipoise.engine.requests import GenerateRequest, SamplingParams, TokenLogprob
from equipoise.errors import EngineDeadError
from helpers.engine_loop import plain_greedy
from helpers.tiny_models import make_tiny_model


def test_pulse_asks_once_and_counts_silence_from_the_pause_on() -> None:
    now = 0.0
    pulse = Pulse(clock=lambda: now)
    assert not pulse.wants_ping()
    now = PING_SECONDS
    assert (pulse.wants_ping(), pulse.wants_ping(), pulse.silent_seconds) == (True, False, 0.0)
    now = PING_SECONDS + 5
    assert pulse.silent_seconds == 5
    pulse.beat()
    assert (pulse.wants_ping(), pulse.silent_seconds) == (False, 0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("m"), "qwen3_moe", num_hidden_layers=2)


async def ask(engine: Engine, rid: str, **sampling: object) -> list[TokenLogprob]:
    params = SamplingParams(**{"max_new_tokens": 4, "temperature": 0.0, "ignore_eos": True, **sampling})  # type: ignore[arg-type]
    found: list[TokenLogprob] = []
    async for event in engine.generate(GenerateRequest(rid, (5, 6, 7), params)):
        found += [*event.prompt_logprobs, *event.logprobs]
    return found


def wait_until(condition: object, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_shows_at_once_comes_back_and_is_given_up_in_the_end(rank: int, model: Path) -> None:
    engine = Engine.launch(ServeConfig(EngineConfig(str(model), ep_size=2, device="cpu", watchdog_timeout=8.0)))
    try:
        time.sleep(2.5)
        assert engine.silent_seconds < 1.0, "an idle engine gives signs of life"
        os.kill(engine.worker_pids[rank], signal.SIGSTOP)
        assert wait_until(lambda: engine.silent_seconds > 2.0, 6)
        assert engine.error is None
        os.kill(engine.worker_pids[rank], signal.SIGCONT)
        assert wait_until(lambda: engine.silent_seconds == 0.0, 6)
        assert len(asyncio.run(ask(engine, "a", logprobs=0))) == 4
        os.kill(engine.worker_pids[rank], signal.SIGSTOP)
        big = tuple([5] * 500)

        async def many() -> None:
            async def one(number: int) -> None:
                async for _ in engine.generate(GenerateRequest(f"b{number}", big, SamplingParams(4))):
                    pass

            await asyncio.gather(*[one(number) for number in range(300)])

        with pytest.raises(EngineDeadError, match="watchdog-timeout"):  # and sending to it has not blocked meanwhile
            asyncio.run(asyncio.wait_for(many(), 30))
    finally:
        engine.close()


def test_log_probabilities_and_broken_requests_on_real_ranks(model: Path) -> None:
    engine = Engine.launch(ServeConfig(EngineConfig(str(model), ep_size=2, device="cpu", chunked_prefill_size=2)))
    try:
        scored = asyncio.run(ask(engine, "a", logprobs=2, prompt_logprobs=True))
        assert [entry.token_id for entry in scored] == [5, 6, 7, *plain_greedy(model, [[5, 6, 7]], 4)[0]]
        assert scored[0].logprob is None
        assert all(entry.logprob == pytest.approx(entry.top[0][1]) for entry in scored[3:]), "greedy: the likeliest"
        only = asyncio.run(ask(engine, "b", logprobs=0, prompt_logprobs=True, max_new_tokens=0))
        assert [entry.logprob for entry in only[1:]] == pytest.approx([e.logprob for e in scored[1:3]], abs=1e-4)
        for temperature in (1e-40, 1e-300):
            assert len(asyncio.run(ask(engine, "c", temperature=temperature, logprobs=0))) == 4
        assert engine.error is None
    finally:
        engine.close()
