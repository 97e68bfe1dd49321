"""create_app: routes, keys, error answers and metrics around one engine."""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

import equipoise
from equipoise.admin.auth import AdminKeyRoute, documented_key
from equipoise.admin.body_limit import BodyLimit
from equipoise.admin.http_errors import ERROR_RESPONSES, install_error_handlers
from equipoise.admin.routes import admin_router
from equipoise.config import ServeConfig
from equipoise.server import generate, info, openai
from equipoise.server.engine_protocol import EngineControl, ServingEngine
from equipoise.server.generation import RequestGenerator
from equipoise.server.middleware import LoopbackHosts, RequestId, is_loopback
from equipoise.server.prometheus import ServerMetrics
from equipoise.server.tokenizing import Tokenizing


def create_app(engine: ServingEngine, config: ServeConfig, registry: CollectorRegistry | None = None) -> FastAPI:
    """The application that :func:`equipoise.server.launch.serve` runs.

    Args:
        engine: generates and takes commands; it is the caller's to close.
        config: names, keys and the dump directory come from it.
        registry: where the metrics live; a fresh one if None.
    """
    # No page of interactive documentation: it would load its scripts from the internet. /openapi.json stays.
    app = FastAPI(
        title="Equipoise", version=equipoise.__version__, docs_url=None, redoc_url=None, responses=ERROR_RESPONSES
    )
    metrics = ServerMetrics(registry if registry is not None else CollectorRegistry())
    app.state.engine = engine
    app.state.config = config
    app.state.metrics = metrics
    app.state.control = EngineControl(engine)
    app.state.tokenizing = Tokenizing(engine.tokenizer, engine.max_model_len)
    app.state.max_model_len = engine.max_model_len
    app.state.generator = RequestGenerator(
        engine,
        metrics,
        max_requests=config.engine.max_running_requests + config.http.max_queued_requests,
        timeout=config.http.request_timeout,
    )
    app.state.model_name = config.http.served_model_name or config.engine.model_path
    app.state.eos_ids = frozenset(engine.eos_token_ids)
    app.state.started = int(time.time())
    install_error_handlers(app, lambda: engine.error)
    app.add_middleware(BodyLimit)
    if is_loopback(config.http.host):
        app.add_middleware(LoopbackHosts, host=config.http.host)
    app.add_middleware(RequestId)
    admin = admin_router(app.state.control, dump_dir=config.http.dump_dir, route_class=AdminKeyRoute)
    app.include_router(info.public)
    for router in (info.router, generate.router, openai.router):
        app.include_router(router, dependencies=documented_key(config.http, admin=False))
    for router in (admin, info.admin):
        app.include_router(router, dependencies=documented_key(config.http, admin=True))
    openapi = app.openapi
    app.openapi = lambda: with_vocabulary(openapi(), engine.vocab_size)  # type: ignore[method-assign]
    return app


def with_vocabulary(schema: Any, vocab_size: int) -> Any:
    """The schema with the largest token id as the bound of lists of them, wherever they are; changed in place."""
    if isinstance(schema, dict):
        if schema.get("items") == {"type": "integer", "minimum": 0}:
            schema["items"]["maximum"] = vocab_size - 1
        for part in schema.values():
            with_vocabulary(part, vocab_size)
    elif isinstance(schema, list):
        for part in schema:
            with_vocabulary(part, vocab_size)
    return schema
