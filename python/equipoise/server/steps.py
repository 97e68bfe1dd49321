"""GET /eplb/steps: the embedded engine's forward passes, for an operator."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse

from equipoise.admin.auth import AdminKeyRoute
from equipoise.admin.codec import jsonable
from equipoise.engine.step_log import GetSteps

router = APIRouter(route_class=AdminKeyRoute)

_MAX_STEP = 2**62  # beyond any forward pass


@router.get("/eplb/steps")
async def steps(request: Request, since: Annotated[int, Query(ge=0, le=_MAX_STEP)] = 0) -> JSONResponse:
    """The forward passes still remembered, from ``since`` on, oldest first."""
    return JSONResponse(jsonable(await request.app.state.engine.control(GetSteps(since))))
