"""A request that cannot be served gets a 4xx that names the field, and nothing a client sends gets a 5xx."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings

from equipoise.admin.body_limit import MAX_BODY_BYTES, BodyLimit
from equipoise.config import EngineConfig, ServeConfig
from equipoise.server.app import create_app
from helpers.bad_requests import BAD_BODIES
from helpers.fake_engine import FakeEngine
from helpers.http_server import error_of, running_server
from helpers.request_strategies import any_request, check_no_request_is_our_fault

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def client(engine: FakeEngine) -> Iterator[httpx.Client]:
    with running_server(create_app(engine, ServeConfig(EngineConfig("a/model")))) as client:
        yield client


@pytest.mark.parametrize(("path", "body", "field"), BAD_BODIES)
def test_refused_by_field(engine: FakeEngine, client: httpx.Client, path: str, body: Any, field: str) -> None:
    finished = len(engine.finished)
    message = error_of(client.post(path, content=json.dumps(body), headers=JSON), 400, field)
    assert field.rpartition(".")[2] in message or field == "body"
    assert "\n" not in message
    assert len(message) < 300
    assert len(engine.finished) == finished
    assert engine.commands == []


def test_the_found_value_is_shown(client: httpx.Client) -> None:
    body = {"text": "a", "sampling_params": {"top_p": "most"}}
    message = error_of(client.post("/generate", json=body), 400, "sampling_params.top_p")
    assert "'most'" in message


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000, b'{"text": NaN', b"nul", b'{"text": "a"} x'])
def test_broken_json(client: httpx.Client, content: bytes) -> None:
    response = client.post("/generate", content=content, headers=JSON)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_missing_content_type_is_told(client: httpx.Client) -> None:
    response = client.post("/generate", content=b'{"text": "a"}')
    assert "Content-Type: application/json" in error_of(response, 400, "body")


def test_announced_body_above_the_limit(client: httpx.Client) -> None:
    with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as raw:
        raw.sendall(
            b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % (MAX_BODY_BYTES + 1)
        )
        assert raw.recv(100).startswith(b"HTTP/1.1 413")


def test_unannounced_body_above_the_limit() -> None:
    async def post(size: int) -> int:
        async def chunks() -> AsyncIterator[bytes]:
            yield b'{"text": "a",'
            for _ in range(size):
                yield b" "
            yield b'"sampling_params": {"max_new_tokens": 1}}'

        app = BodyLimit(create_app(FakeEngine(), ServeConfig(EngineConfig("a/model"))), max_bytes=100)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return (await client.post("/generate", content=chunks(), headers=JSON)).status_code

    assert asyncio.run(post(10)) == 200
    assert asyncio.run(post(100)) == 413


def test_unknown_model(client: httpx.Client) -> None:
    response = client.post("/v1/completions", json={"prompt": "a", "model": "gpt"})
    assert "'a/model'" in error_of(response, 404, "model")


def test_unknown_path_and_method(client: httpx.Client) -> None:
    error_of(client.get("/nowhere"), 404)
    error_of(client.get("/generate"), 405)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(request=any_request)
def test_no_request_is_our_fault(client: httpx.Client, request: tuple[str, Any]) -> None:
    check_no_request_is_our_fault(client, *request)
