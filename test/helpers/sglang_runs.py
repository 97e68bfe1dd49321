"""Runs of the real SGLang server with the plugin: starting one, asking for rebalances, hook counts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from helpers.sglang_server import Answers, SglangServer

EPLB = ("--enable-eplb", "--ep-num-redundant-experts=4", "--eplb-algorithm=equipoise")
TWO_RANKS = ("--tp=2", "--ep=2", *EPLB)
PERIODIC = "--eplb-rebalance-num-iterations=40"  # without: by request alone, in as many passes as a test has
SERIAL = "--disable-overlap-schedule"


def start(model: Path, level: str, flags: tuple[str, ...], tmp_path: Path, **environment: str) -> SglangServer:
    environment = {"EQUIPOISE_SGLANG": level, "SGLANG_CPU_CALLS": str(tmp_path), **environment}
    return SglangServer(model, flags, log=tmp_path / "server.log", plugins=["equipoise"], environment=environment)


def rebalance(server: SglangServer, **options: Any) -> dict[str, Any]:
    """Asks for a rebalance; the report."""
    reply = server.post("/eplb/rebalance", **options)
    assert reply.status_code == 200, reply.text
    return reply.json()


def wait_for_kernels(server: SglangServer) -> None:
    """Until a plan no longer waits for a compiler."""
    rebalance(server, dry_run=True)


def moved_while_answering(server: SglangServer, expected: Answers) -> dict[str, Any]:
    """A rebalance that moves experts, asked for while requests run; their answers are compared."""
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(server.answers, concurrency=3)
        report = rebalance(server)
        assert answers.result() == expected
    return report


def calls_of_ranks(directory: Path, hook: str) -> list[dict[str, int]]:
    """Hook counts of the processes in which ``hook`` ran."""
    found = [json.loads(file.read_text()) for file in directory.glob("*.json")]
    return [calls for calls in found if calls.get(hook)]


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} not within {seconds:g} s"
        time.sleep(0.2)
