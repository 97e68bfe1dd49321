"""admin_router: rebalance now, look at the balance, record. State changes by POST only."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from equipoise.admin.bodies import PauseBody, RebalanceBody, RecordBody
from equipoise.admin.codec import jsonable
from equipoise.admin.http_errors import ERROR_RESPONSES, ErrorAnsweringRoute, error_body
from equipoise.errors import ConfigError
from equipoise.load.stream_report import RecordingReply
from equipoise.manager.commands import (
    Command,
    DumpRecording,
    GetExpertLocation,
    GetRecording,
    GetStatus,
    Pause,
    Rebalance,
    Resume,
    StartRecording,
    StopRecording,
)
from equipoise.manager.reports import RebalanceReport

Control = Callable[[Command], Awaitable[Any]]
"""Brings a command to every rank, in the same order on all of them; answers with rank 0's reply or raises its error."""

_MAX_INT = 2**62  # beyond any count
_MAX_WRITE_SECONDS, _POLL_SECONDS = 30.0, 0.05


def admin_router(control: Control, *, dump_dir: str, route_class: type[APIRoute] = ErrorAnsweringRoute) -> APIRouter:
    """The operator's routes.

    Args:
        control: how a command reaches the ranks.
        dump_dir: directory that /dump_expert_distribution_record writes into.
        route_class: asks for keys, answers errors. The default answers errors only, for an application whose middleware
            asks for keys.
    """
    router = APIRouter(route_class=route_class, responses=ERROR_RESPONSES)
    _add_balancing(router, control)
    _add_recording(router, control, dump_dir)
    return router


def _add_balancing(router: APIRouter, control: Control) -> None:
    @router.post("/eplb/rebalance")
    async def rebalance(body: RebalanceBody | None = None) -> JSONResponse:
        """Plans from the load window of now, migrates, and answers when the last layer has committed.

        A migration that failed answers 500 with the report, one that a pause cancelled 409: the layers that had not
        committed serve on as they were.
        """
        asked = body or RebalanceBody()
        if asked.max_moves_per_layer is not None and not 0 <= asked.max_moves_per_layer < _MAX_INT:
            raise ConfigError(
                f"max_moves_per_layer must be at least 0, got {asked.max_moves_per_layer}", field="max_moves_per_layer"
            )
        if asked.move_price is not None and not 0 <= asked.move_price < math.inf:
            raise ConfigError(f"move_price must be finite and at least 0, got {asked.move_price}", field="move_price")
        command = Rebalance(asked.algorithm, asked.dry_run, asked.max_moves_per_layer, asked.move_price)
        report: RebalanceReport = await _shielded(control(command))
        if report.outcome == "failed":
            failure = error_body(report.error or report.reason, "TransferError", code=500)
            return JSONResponse({**failure, "report": jsonable(report)}, status_code=500)
        if report.outcome == "cancelled":
            refusal = error_body(report.error or report.reason, "PhaseError", code=409)
            return JSONResponse({**refusal, "report": jsonable(report)}, status_code=409)
        return JSONResponse(jsonable(report))

    @router.post("/eplb/pause")
    async def pause(body: PauseBody | None = None) -> JSONResponse:
        """Begins no rebalance until /eplb/resume; one under way is cancelled. Answers once nothing moves."""
        await _shielded(control(Pause((body or PauseBody()).reason)))
        return JSONResponse({"message": "paused"})

    @router.post("/eplb/resume")
    async def resume() -> JSONResponse:
        """Takes up rebalancing again."""
        await control(Resume())
        return JSONResponse({"message": "rebalancing"})

    @router.get("/eplb/status")
    async def status() -> JSONResponse:
        """Phase, balancedness of the load window on the present placement, the last rebalance."""
        return JSONResponse(jsonable(await control(GetStatus())))

    @router.get("/eplb/expert_location")
    async def expert_location() -> JSONResponse:
        """The live placement: which logical expert each slot holds, per layer, with dispatch weights."""
        return JSONResponse(jsonable(await control(GetExpertLocation())))


def _add_recording(router: APIRouter, control: Control, dump_dir: str) -> None:
    @router.post("/start_expert_distribution_record")
    async def start_record(body: RecordBody | None = None) -> JSONResponse:
        """Begins a recording. One for a dump that was there is dropped; a streamed one that runs is stopped.

        A streamed one is written to a new folder in --dump-dir, which the answer names, a file for each rank.
        """
        mode, now = (body or RecordBody()).stream, time.time()
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now)) + f"{now % 1:.3f}"[2:]
        name = f"expert_distribution_{stamp}" if mode is not None else ""
        reply = await control(StartRecording(mode, dump_dir, name))
        return JSONResponse({"message": "recording", **_stream_of(reply)})

    @router.post("/stop_expert_distribution_record")
    async def stop_record() -> JSONResponse:
        """Ends the recording. 409 if none runs.

        What is in memory can still be dumped. A streamed one is waited for until its files are closed, half a minute at
        most; the answer says what was written and dropped.
        """
        reply = await _shielded(_stop_and_wait(control))
        return JSONResponse({"message": "stopped", **_stream_of(reply)})

    @router.get("/status_expert_distribution_record")
    async def record_status() -> JSONResponse:
        """Whether a recording runs, and what a streamed one has written and dropped so far."""
        reply: RecordingReply = await control(GetRecording())
        return JSONResponse({"recording": reply.recording, **_stream_of(reply)})

    @router.post("/dump_expert_distribution_record")
    async def dump_record() -> JSONResponse:
        """Writes what was recorded to a new file in --dump-dir and answers with its path."""
        return JSONResponse(jsonable(await _shielded(control(DumpRecording(dump_dir)))))


async def _stop_and_wait(control: Control) -> RecordingReply:
    reply: RecordingReply = await control(StopRecording())
    waited = 0.0
    while reply.stream is not None and not reply.stream.finished and waited < _MAX_WRITE_SECONDS:
        await asyncio.sleep(_POLL_SECONDS)
        waited += _POLL_SECONDS
        now: RecordingReply = await control(GetRecording())
        if now.stream is None or now.stream.path != reply.stream.path:  # another one was begun
            break
        reply = now
    return reply


def _stream_of(reply: RecordingReply) -> dict[str, Any]:
    return {} if reply.stream is None else {"stream": jsonable(reply.stream)}


async def _shielded(work: Awaitable[Any]) -> Any:
    """The result of ``work``, which goes on if its client hangs up: ranks must not be left with half a command."""
    return await asyncio.shield(asyncio.ensure_future(work))
