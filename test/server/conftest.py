"""One real engine for the tests that need one: a tiny model on two gloo ranks, behind a real HTTP server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from equipoise.config import EngineConfig, EplbConfig, HttpConfig, ServeConfig
from equipoise.engine.engine import Engine
from equipoise.server.app import create_app
from helpers.http_server import running_server


@dataclass(frozen=True)
class RealServer:
    client: httpx.Client
    engine: Engine
    model: Path
    dumps: Path


@pytest.fixture(scope="session")
def real_server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    dumps = tmp_path_factory.mktemp("dumps")
    config = ServeConfig(
        EngineConfig(str(tiny_model), ep_size=2, nnodes=2, device="cpu", max_model_len=256),
        EplbConfig(ep_num_redundant_experts=4),
        HttpConfig(dump_dir=str(dumps), served_model_name="tiny"),
    )
    engine = Engine.launch(config)
    try:
        with running_server(create_app(engine, config)) as client:
            yield RealServer(client, engine, tiny_model, dumps)
    finally:
        engine.close()
