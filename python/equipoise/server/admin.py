"""What an operator does: rebalance now, look at the balance, record. State changes by POST only."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse

from equipoise.errors import ConfigError
from equipoise.manager.commands import (
    Command,
    DumpRecording,
    DumpReply,
    GetExpertLocation,
    GetStatus,
    GetSteps,
    Rebalance,
    RebalanceReport,
    StartRecording,
    StopRecording,
)
from equipoise.server.auth import AdminKeyRoute
from equipoise.server.errors import error_body
from equipoise.server.request_models import RebalanceBody


def jsonable(value: Any) -> Any:
    """``value`` with dataclasses as objects and numbers that JSON has no word for (NaN, infinity) as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(value, RebalanceReport):
            fields["bytes_moved"] = value.bytes_moved
        return fields
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


router = APIRouter(route_class=AdminKeyRoute)

_FAR_STEP = 2**62  # beyond any forward pass


@router.post("/eplb/rebalance")
async def rebalance(request: Request, body: RebalanceBody | None = None) -> JSONResponse:
    """Plans from the load window of now, migrates, and answers when the last layer has committed.

    A migration that failed answers 500 with the report: the old placement serves on.
    """
    wish = body or RebalanceBody()
    if wish.max_moves_per_layer is not None and not 0 <= wish.max_moves_per_layer < _FAR_STEP:
        raise ConfigError(
            f"max_moves_per_layer must be at least 0, got {wish.max_moves_per_layer}", field="max_moves_per_layer"
        )
    command = Rebalance(wish.algorithm, wish.dry_run, wish.max_moves_per_layer)
    # Shielded: an operator who hangs up must not leave the ranks with half a command.
    report: RebalanceReport = await asyncio.shield(asyncio.ensure_future(request.app.state.engine.control(command)))
    if report.outcome == "failed":
        failure = error_body(report.error or report.reason, "TransferError")
        return JSONResponse({**failure, "report": jsonable(report)}, status_code=500)
    return JSONResponse(jsonable(report))


@router.get("/eplb/status")
async def status(request: Request) -> JSONResponse:
    """Phase, balancedness of the load window on the present placement, the last rebalance."""
    return await _reply(request, GetStatus())


@router.get("/eplb/expert_location")
async def expert_location(request: Request) -> JSONResponse:
    """The live placement: which logical expert each slot holds, per layer, with dispatch weights."""
    return await _reply(request, GetExpertLocation())


@router.get("/eplb/steps")
async def steps(request: Request, since: Annotated[int, Query(ge=0, le=_FAR_STEP)] = 0) -> JSONResponse:
    """The forward passes still remembered, from ``since`` on, oldest first."""
    return await _reply(request, GetSteps(since))


@router.post("/start_expert_distribution_record")
async def start_record(request: Request) -> JSONResponse:
    """Begins a recording; an earlier one is dropped."""
    await request.app.state.engine.control(StartRecording())
    return JSONResponse({"message": "recording"})


@router.post("/stop_expert_distribution_record")
async def stop_record(request: Request) -> JSONResponse:
    """Ends the recording, which can still be dumped. 409 if none runs."""
    await request.app.state.engine.control(StopRecording())
    return JSONResponse({"message": "stopped"})


@router.post("/dump_expert_distribution_record")
async def dump_record(request: Request) -> JSONResponse:
    """Writes what was recorded to a new file in --dump-dir and answers with its path."""
    directory = request.app.state.config.http.dump_dir
    work = request.app.state.engine.control(DumpRecording(directory))
    reply: DumpReply = await asyncio.shield(asyncio.ensure_future(work))
    return JSONResponse(jsonable(reply))


async def _reply(request: Request, command: Command) -> JSONResponse:
    return JSONResponse(jsonable(await request.app.state.engine.control(command)))
