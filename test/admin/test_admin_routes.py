"""The operator's routes on an application that knows nothing of Equipoise, as a host engine's is."""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
import sys
import time
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from equipoise.admin.http_errors import ErrorAnsweringRoute
from equipoise.admin.routes import admin_router
from equipoise.errors import ConfigError, EngineDeadError, EquipoiseError, PhaseError, StorageError
from equipoise.load.stream_report import RecordingReply, StreamReply, StreamReport
from equipoise.manager.commands import (
    Command,
    DumpRecording,
    GetRecording,
    GetStatus,
    Pause,
    Rebalance,
    Resume,
    StartRecording,
    StopRecording,
)
from helpers.fake_engine import REPORT
from helpers.http_server import error_of, running_server


class Ranks:
    """Answers every command with ``reply``, or raises it."""

    def __init__(self, reply: Any = None) -> None:
        self.reply = reply
        self.commands: list[Command] = []

    async def control(self, command: Command) -> Any:
        self.commands.append(command)
        if isinstance(self.reply, EquipoiseError):
            raise self.reply
        return self.reply


def call(ranks: Ranks, method: str, path: str, **given: Any) -> httpx.Response:
    app = FastAPI()
    app.include_router(admin_router(ranks.control, dump_dir="dumps"))
    with running_server(app) as client:
        return client.request(method, path, **given)


def test_commands_reach_the_ranks_and_replies_the_operator() -> None:
    ranks = Ranks(REPORT)
    answer = call(ranks, "POST", "/eplb/rebalance", json={"dry_run": True, "max_moves_per_layer": 3})
    assert answer.status_code == 200
    assert answer.json()["bytes_moved"] == REPORT.bytes_moved
    ranks.reply = RecordingReply(True, None)
    call(ranks, "POST", "/start_expert_distribution_record")
    assert call(ranks, "GET", "/status_expert_distribution_record").json() == {"recording": True}
    call(ranks, "POST", "/dump_expert_distribution_record")
    call(ranks, "GET", "/eplb/status")
    recording = [StartRecording(directory="dumps"), GetRecording(), DumpRecording("dumps")]
    assert ranks.commands == [Rebalance(None, True, 3), *recording, GetStatus()]


def test_a_streamed_recording_has_a_folder_of_its_own_and_its_end_is_waited_for() -> None:
    def reply(finished: bool) -> RecordingReply:
        report = StreamReport("/d/name/rank_0.safetensors", 7, 7 if finished else 3, 2, [[4, 5]], finished, None)
        return RecordingReply(False, StreamReply("/d/name", "per_pass", finished, [report]))

    class WritingRanks(Ranks):
        async def control(self, command: Command) -> Any:
            self.reply = reply(len(self.commands) >= 3)
            return await super().control(command)

    ranks = WritingRanks()
    started = call(ranks, "POST", "/start_expert_distribution_record", json={"stream": "per_pass"})
    (begun,) = ranks.commands
    assert isinstance(begun, StartRecording)
    assert (begun.stream, begun.directory) == ("per_pass", "dumps")
    assert begun.name.startswith("expert_distribution_2")
    assert started.json()["stream"]["path"] == "/d/name"
    answer = call(ranks, "POST", "/stop_expert_distribution_record").json()
    assert ranks.commands[1:] == [StopRecording(), GetRecording(), GetRecording()]
    (rank,) = answer["stream"]["ranks"]
    assert (rank["num_written"], rank["num_dropped"], rank["dropped"], rank["finished"]) == (7, 2, [[4, 5]], True)
    refused = call(ranks, "POST", "/start_expert_distribution_record", json={"stream": "everything"})
    assert error_of(refused, 400, "stream")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("no", field="algorithm"), 400),
        (PhaseError("not now"), 409),
        (StorageError("full"), 507),
        (EngineDeadError("gone"), 503),
    ],
)
def test_errors_answer_without_handlers_of_the_application(error: EquipoiseError, status: int) -> None:
    answer = call(Ranks(error), "POST", "/eplb/rebalance")
    assert str(error) in error_of(answer, status, getattr(error, "field", None))


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"algoritm": "auto"}, "algoritm"),
        ({"dry_run": 1}, "dry_run"),
        ({"max_moves_per_layer": -1}, "max_moves_per_layer"),
    ],
)
def test_bad_bodies_are_refused_by_field_before_any_rank_hears(body: dict[str, Any], field: str) -> None:
    ranks = Ranks()
    answer = call(ranks, "POST", "/eplb/rebalance", json=body)
    assert field in error_of(answer, 400, field)
    assert not ranks.commands


def test_a_rebalance_goes_on_when_its_operator_hangs_up() -> None:
    finished = []

    async def slow(command: Command) -> Any:
        await asyncio.sleep(0.5)
        finished.append(command)
        return REPORT

    app = FastAPI()
    app.include_router(admin_router(slow, dump_dir="."))
    with running_server(app) as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/eplb/rebalance", timeout=0.1)
        deadline = time.monotonic() + 10
        while not finished and time.monotonic() < deadline:
            time.sleep(0.01)
    assert finished == [Rebalance()]


def test_a_host_can_mark_the_endpoints_by_a_route_class() -> None:
    class Marked(ErrorAnsweringRoute):
        def __init__(self, path: str, endpoint: Any, **given: Any) -> None:
            endpoint.level = "admin"
            super().__init__(path, endpoint, **given)

    router = admin_router(Ranks().control, dump_dir=".", route_class=Marked)
    assert {route.endpoint.level for route in router.routes if isinstance(route, APIRoute)} == {"admin"}


def test_a_rebalance_that_a_pause_cancelled_is_a_conflict_with_its_report() -> None:
    cancelled = dataclasses.replace(REPORT, outcome="cancelled", error="paused: a reload")
    answer = call(Ranks(cancelled), "POST", "/eplb/rebalance")
    assert answer.status_code == 409
    assert answer.json()["error"]["message"] == "paused: a reload"
    assert answer.json()["report"]["outcome"] == "cancelled"


def test_pause_and_resume_reach_the_ranks() -> None:
    ranks = Ranks()
    assert call(ranks, "POST", "/eplb/pause").json() == {"message": "paused"}
    call(ranks, "POST", "/eplb/pause", json={"reason": "new weights"})
    assert call(ranks, "POST", "/eplb/resume").json() == {"message": "rebalancing"}
    assert ranks.commands == [Pause(), Pause("new weights"), Resume()]


def test_an_admin_router_needs_no_torch() -> None:
    """The HTTP process of a host answers before any rank has loaded: it must not pay for torch."""
    code = "import sys, equipoise.admin.routes, equipoise.admin.codec; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
