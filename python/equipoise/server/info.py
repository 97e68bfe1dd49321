"""What is running: health for a load balancer, the model's name for a client, settings and metrics for an operator."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

import equipoise
from equipoise.admin.auth import AdminKeyRoute, ApiKeyRoute
from equipoise.admin.bodies import StrictBody
from equipoise.admin.codec import jsonable
from equipoise.admin.http_errors import error_body
from equipoise.config import ServeConfig
from equipoise.engine.requests import GenerateRequest, SamplingParams
from equipoise.engine.step_log import GetSteps
from equipoise.server.fields import Text
from equipoise.server.openai import check_model

public = APIRouter()
router = APIRouter(route_class=ApiKeyRoute)
admin = APIRouter(route_class=AdminKeyRoute)

_MAX_STEP = 2**62  # beyond any forward pass


@public.head("/health", include_in_schema=False)
@public.get("/health")
async def health(request: Request) -> JSONResponse:
    """200 while the engine lives and makes progress, else 503 with the reason. Needs no key: probes have none."""
    state = request.app.state
    error, silent = state.engine.error, state.engine.silent_seconds
    if error is not None:
        return _unhealthy(f"the engine is dead: {error}", "EngineDeadError")
    if silent > state.config.http.health_timeout:
        return _unhealthy(f"the engine has given no sign of life for {silent:.0f} s: a rank hangs", "EngineSilent")
    return JSONResponse({"status": "ok"})


@router.get("/health_generate")
async def health_generate(request: Request) -> JSONResponse:
    """200 if one token can be generated now; 503 if not, or not within --health-timeout."""
    state = request.app.state
    probe = GenerateRequest(f"health-{uuid.uuid4().hex}", (0,), SamplingParams(1, temperature=0.0, ignore_eos=True))
    try:
        async with asyncio.timeout(state.config.http.health_timeout):
            async for _ in state.engine.generate(probe):
                pass
    except TimeoutError:
        return _unhealthy(f"no token within {state.config.http.health_timeout:g} s", "EngineSilent")
    return JSONResponse({"status": "ok"})


def _unhealthy(message: str, kind: str) -> JSONResponse:
    return JSONResponse(error_body(message, kind, code=503), status_code=503)


@router.get("/v1/models")
async def models(request: Request) -> JSONResponse:
    """The one model, in OpenAI's list shape."""
    return JSONResponse({"object": "list", "data": [_model(request)]})


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> JSONResponse:
    """The one model by its name; 404 for any other."""
    check_model(request, name)
    return JSONResponse(_model(request))


def _model(request: Request) -> dict[str, Any]:
    state = request.app.state
    return {
        "id": state.model_name,
        "object": "model",
        "created": state.started,
        "owned_by": "equipoise",
        "max_model_len": state.max_model_len,
    }


@router.get("/get_model_info")
async def model_info(request: Request) -> JSONResponse:
    """Path and name of the model."""
    state = request.app.state
    return JSONResponse(
        {"model_path": state.config.engine.model_path, "served_model_name": state.model_name, "is_generation": True}
    )


@router.get("/server_info")
@router.get("/get_server_info", operation_id="get_server_info")
async def server_info(request: Request) -> JSONResponse:
    """Version and every option; keys only as whether they are set."""
    return JSONResponse({"version": equipoise.__version__, **options_without_keys(request.app.state.config)})


class AbortBody(StrictBody):
    rid: Text


@router.post("/abort_request")
async def abort_request(body: AbortBody, request: Request) -> JSONResponse:
    """Ends a running request, whose answer says so with the finish reason ``abort``. Nothing if there is none."""
    return JSONResponse({"aborted": await request.app.state.generator.abort(body.rid)})


@admin.get("/eplb/steps")
async def steps(request: Request, since: Annotated[int, Query(ge=0, le=_MAX_STEP)] = 0) -> JSONResponse:
    """The forward passes still remembered, from ``since`` on, oldest first."""
    return JSONResponse(jsonable(await request.app.state.control(GetSteps(since))))


def options_without_keys(config: ServeConfig) -> dict[str, Any]:
    """All options in one flat object, as on the command line. A key that is set shows as ``"set"``."""
    options: dict[str, Any] = {}
    for group in (config.engine, config.eplb, config.http):
        options.update(dataclasses.asdict(group))
    for name in options:
        if name.endswith("api_key") and options[name] is not None:
            options[name] = "set"
    return options


@router.get(
    "/metrics", response_class=Response, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
)
async def metrics(request: Request) -> Response:
    """Prometheus text."""
    state = request.app.state
    await state.metrics.refresh(state.engine, state.control)
    return Response(generate_latest(state.metrics.registry), media_type=CONTENT_TYPE_LATEST)
