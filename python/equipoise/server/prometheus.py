"""Metrics of a server, in a registry of its own: two servers in one process do not meet."""

from __future__ import annotations

import asyncio
import contextlib

from prometheus_client import CollectorRegistry, Counter, Gauge

from equipoise.engine.step_log import GetStepTotals
from equipoise.errors import EquipoiseError
from equipoise.manager.commands import GetStatus
from equipoise.server.engine_figures import EngineFigures
from equipoise.server.engine_protocol import EngineControl, ServingEngine


class ServerMetrics:
    """Counts requests as they come; asks the engine for the rest when scraped."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._refreshing = asyncio.Lock()
        self._figures = EngineFigures()
        registry.register(self._figures)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"equipoise_{name}", text, registry=registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"equipoise_{name}", text, labels, registry=registry)

        self.waiting = gauge("waiting_requests", "Requests whose first token has not come yet")
        self.silent = gauge("engine_silent_seconds", "Seconds since all ranks last gave a sign of life")
        self.up = gauge("engine_up", "1 while the engine lives")
        self.running = gauge("running_requests", "Requests that have not finished, waiting ones included")
        self.requests = counter(
            "requests", "Requests by how they ended: stop, length, abort, refused or error", ("finish_reason",)
        )
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts that got an answer")
        self.generated_tokens = counter("generated_tokens", "Tokens answered")

    def request_ended(self, finish_reason: str) -> None:
        self.running.dec()
        self.requests.labels(finish_reason).inc()

    async def refresh(self, engine: ServingEngine, control: EngineControl) -> None:
        """Bring the figures that the engine holds up to date, one by one: what fails leaves its own as they were."""
        async with self._refreshing:
            if engine.error is None:  # /metrics outlives the engine: engine_up says what happened
                with contextlib.suppress(EquipoiseError):
                    self._figures.status = await control(GetStatus())
                with contextlib.suppress(EquipoiseError):
                    self._figures.steps = await control(GetStepTotals())
            self.up.set(engine.error is None)
            self.silent.set(engine.silent_seconds)
