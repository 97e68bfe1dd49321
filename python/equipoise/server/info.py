"""What is running: health for a load balancer, the model's name for a client, settings and metrics for an operator."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

import equipoise
from equipoise.admin.auth import ApiKeyRoute
from equipoise.admin.http_errors import error_body
from equipoise.config import ServeConfig

public = APIRouter()
router = APIRouter(route_class=ApiKeyRoute)


@public.get("/health")
async def health(request: Request) -> JSONResponse:
    """200 while the engine lives, else 503 with the reason. Needs no key: probes have none."""
    error = request.app.state.engine.error
    if error is not None:
        return JSONResponse(error_body(f"the engine is dead: {error}", "EngineDeadError"), status_code=503)
    return JSONResponse({"status": "ok"})


@router.get("/v1/models")
async def models(request: Request) -> JSONResponse:
    """The one model, in OpenAI's list shape."""
    state = request.app.state
    model = {
        "id": state.model_name,
        "object": "model",
        "created": state.started,
        "owned_by": "equipoise",
        "max_model_len": state.config.engine.max_model_len,
    }
    return JSONResponse({"object": "list", "data": [model]})


@router.get("/get_model_info")
async def model_info(request: Request) -> JSONResponse:
    """Path and name of the model."""
    state = request.app.state
    return JSONResponse(
        {"model_path": state.config.engine.model_path, "served_model_name": state.model_name, "is_generation": True}
    )


@router.get("/server_info")
async def server_info(request: Request) -> JSONResponse:
    """Version and every option; keys only as whether they are set."""
    return JSONResponse({"version": equipoise.__version__, **options_without_keys(request.app.state.config)})


def options_without_keys(config: ServeConfig) -> dict[str, Any]:
    """All options in one flat object, as on the command line. A key that is set shows as ``"set"``."""
    options: dict[str, Any] = {}
    for group in (config.engine, config.eplb, config.http):
        options.update(dataclasses.asdict(group))
    for name in options:
        if name.endswith("api_key") and options[name] is not None:
            options[name] = "set"
    return options


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus text."""
    state = request.app.state
    await state.metrics.refresh(state.engine)
    return Response(generate_latest(state.metrics.registry), media_type=CONTENT_TYPE_LATEST)
