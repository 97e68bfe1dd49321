"""admin_router: rebalance now, look at the balance, record. State changes by POST only."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from equipoise.admin.bodies import PauseBody, RebalanceBody
from equipoise.admin.codec import jsonable
from equipoise.admin.http_errors import ERROR_RESPONSES, ErrorAnsweringRoute, error_body
from equipoise.errors import ConfigError
from equipoise.manager.commands import (
    Command,
    DumpRecording,
    GetExpertLocation,
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
    async def start_record() -> JSONResponse:
        """Begins a recording; an earlier one is dropped."""
        await control(StartRecording())
        return JSONResponse({"message": "recording"})

    @router.post("/stop_expert_distribution_record")
    async def stop_record() -> JSONResponse:
        """Ends the recording, which can still be dumped. 409 if none runs."""
        await control(StopRecording())
        return JSONResponse({"message": "stopped"})

    @router.post("/dump_expert_distribution_record")
    async def dump_record() -> JSONResponse:
        """Writes what was recorded to a new file in --dump-dir and answers with its path."""
        return JSONResponse(jsonable(await _shielded(control(DumpRecording(dump_dir)))))


async def _shielded(work: Awaitable[Any]) -> Any:
    """The result of ``work``, which goes on if its client hangs up: ranks must not be left with half a command."""
    return await asyncio.shield(asyncio.ensure_future(work))
