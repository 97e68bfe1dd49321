"""What a server lets in, for how long, and from where: against an engine that does what it is told."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from typing import Any

import httpx
import pytest

from equipoise.admin.http_errors import HttpError
from equipoise.config import EngineConfig, HttpConfig, ServeConfig
from equipoise.engine.step_log import GetStepTotals
from equipoise.errors import EquipoiseError
from equipoise.manager.commands import GetStatus, Rebalance
from equipoise.server import middleware
from equipoise.server.app import create_app
from equipoise.server.engine_protocol import EngineControl
from equipoise.server.tokenizing import Tokenizing
from helpers.fake_engine import ByteTokenizer, FakeEngine
from helpers.http_server import error_of, running_server


def config(**http: Any) -> ServeConfig:
    return ServeConfig(EngineConfig("a/model", max_running_requests=2), http=HttpConfig(**http))


def test_more_requests_than_may_wait_are_refused_with_429() -> None:
    with running_server(create_app(FakeEngine(delay=0.2), config(max_queued_requests=1))) as client:
        body = {"text": ["a"] * 3, "sampling_params": {"max_new_tokens": 8}}
        thread = threading.Thread(target=lambda: client.post("/generate", json=body))
        thread.start()
        time.sleep(0.5)
        assert "running_requests 3.0" in client.get("/metrics").text
        assert "try again later" in error_of(client.post("/generate", json={"text": "a"}), 429)
        thread.join()
        assert client.post("/generate", json={"text": "a", "sampling_params": {"max_new_tokens": 1}}).status_code == 200
        assert "waiting_requests 0.0" in client.get("/metrics").text


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_past_its_deadline_ends_with_504(stream: bool) -> None:
    engine = FakeEngine(delay=0.1)
    with running_server(create_app(engine, config(request_timeout=0.5))) as client:
        body = {"text": "a", "rid": "slow", "stream": stream, "sampling_params": {"max_new_tokens": 60}}
        response = client.post("/generate", json=body)
        assert "request-timeout" in response.text
        assert response.status_code == (200 if stream else 504)
        time.sleep(0.2)
        assert engine.aborted == ["slow"]


def test_texts_that_cannot_fit_are_refused_before_they_cost_anything() -> None:
    class Counting(ByteTokenizer):
        calls = 0

        def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
            Counting.calls += 1
            return super().__call__(text, **options)

        def get_vocab(self) -> dict[str, int]:
            return {"abcd": 0, "x": 1}

    engine = FakeEngine()
    engine.tokenizer = Counting()
    with running_server(create_app(engine, config())) as client:
        error_of(client.post("/generate", json={"text": "a" * 257}), 400, "text")
        assert Counting.calls == 0
        assert client.post("/generate", json={"text": "a" * 40}).status_code == 200


def test_a_long_text_does_not_hold_up_a_short_one() -> None:
    class Slow(ByteTokenizer):
        def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
            time.sleep(2.0 if len(text) > 1000 else 0.0)
            return super().__call__(text, **options)

        def get_vocab(self) -> dict[str, int]:
            return {"x" * 10_000: 0}

    async def run() -> float:
        tokenizing = Tokenizing(Slow(), 64)
        long = asyncio.create_task(tokenizing.token_ids("a" * 20_000, "text"))
        await asyncio.sleep(0.1)
        began = time.monotonic()
        await tokenizing.token_ids("short", "text")
        seconds = time.monotonic() - began
        await long
        return seconds

    assert asyncio.run(run()) < 1.0


def test_hosts_are_checked_on_loopback_only() -> None:
    for host, wanted in (("127.0.0.1", 421), ("0.0.0.0", 200)):
        with running_server(create_app(FakeEngine(), config(host=host))) as client:
            assert client.get("/health", headers={"Host": "evil.example"}).status_code == wanted
            for name in ("localhost:7", "127.0.0.1", "[::1]:80"):
                assert client.get("/health", headers={"Host": name}).status_code == 200


def test_every_answer_carries_a_request_id() -> None:
    with running_server(create_app(FakeEngine(), config())) as client:
        first, second = (client.get(path).headers["x-request-id"] for path in ("/health", "/nowhere"))
        assert first != second
        assert client.get("/health", headers={"X-Request-Id": "mine"}).headers["x-request-id"] == "mine"


def test_half_open_connections_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "_HALF_OPEN_SECONDS", 1.0)
    with running_server(create_app(FakeEngine(), config()), http=middleware.PatientH11) as client:
        address = (client.base_url.host, client.base_url.port)
        for sent in (
            b"",
            b"POST /generate HT",
            b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
        ):
            with socket.create_connection(address, timeout=8) as raw:
                raw.sendall(sent)
                while raw.recv(1000):
                    pass  # an answer may come first; then the other side closes
        slow = FakeEngine(delay=0.5)
    with running_server(create_app(slow, config()), http=middleware.PatientH11) as client:
        body = {"text": "a", "sampling_params": {"max_new_tokens": 6}}
        assert client.post("/generate", json=body).status_code == 200, "an answer may take longer than that"


def test_metrics_keep_what_can_be_had_where_one_question_fails() -> None:
    class HalfDeaf(FakeEngine):
        async def control(self, command: Any) -> Any:
            if isinstance(command, GetStepTotals):
                raise EquipoiseError("not here")
            return await super().control(command)

    with running_server(create_app(HalfDeaf(), config())) as client:
        text = client.get("/metrics").text
        assert "equipoise_balancedness_mean 0.75" in text
        assert "equipoise_steps_total" not in text


def test_commands_end_when_the_server_does() -> None:
    class Deaf(FakeEngine):
        async def control(self, command: Any) -> Any:  # noqa: ARG002 - the interface
            await asyncio.sleep(60)

    async def run() -> HttpError:
        control = EngineControl(Deaf())
        task = asyncio.create_task(control(Rebalance()))
        await asyncio.sleep(0.1)
        control.close()
        with pytest.raises(HttpError) as caught:
            await asyncio.wait_for(task, 5)
        return caught.value

    assert asyncio.run(run()).status == 503


def test_a_silent_engine_is_answered_for_from_what_is_known() -> None:
    class Silent(FakeEngine):
        async def control(self, command: Any) -> Any:
            if self.silent_seconds:
                await asyncio.sleep(60)
            return await super().control(command)

    async def run() -> None:
        engine = Silent()
        control = EngineControl(engine)
        known = await control(GetStatus())
        engine.silent_seconds = 30.0
        later = await asyncio.wait_for(control(GetStatus()), 5)
        assert (later.phase, later.rank_load) == (known.phase, known.rank_load)
        assert "30 s" in later.error
        with pytest.raises(HttpError, match="no sign of life"):
            await asyncio.wait_for(control(GetStepTotals()), 5)

    asyncio.run(run())


def test_abort_request_ends_a_running_one() -> None:
    engine = FakeEngine(delay=0.1)
    with running_server(create_app(engine, config())) as client:
        answers: list[httpx.Response] = []
        body = {"text": "a", "rid": "mine", "sampling_params": {"max_new_tokens": 60}}
        thread = threading.Thread(target=lambda: answers.append(client.post("/generate", json=body)))
        thread.start()
        time.sleep(0.5)
        assert client.post("/abort_request", json={"rid": "other"}).json() == {"aborted": False}
        assert client.post("/abort_request", json={"rid": "mine"}).json() == {"aborted": True}
        thread.join(10)
        assert answers[0].json()["meta_info"]["finish_reason"] == {"type": "abort"}
