"""What /metrics shows, in a registry of its own: two servers in one process do not meet."""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry, Counter, Gauge

from equipoise.engine.step_log import GetStepTotals
from equipoise.errors import EquipoiseError
from equipoise.manager.commands import GetStatus
from equipoise.server.engine_figures import EngineFigures
from equipoise.server.engine_protocol import ServingEngine


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

    async def refresh(self, engine: ServingEngine) -> None:
        """Brings the figures that the engine holds up to date. A dead engine leaves them as they were."""
        async with self._refreshing:
            try:
                if engine.error is None:
                    status = await engine.control(GetStatus())
                    self._figures.saw(status, await engine.control(GetStepTotals()))
            except EquipoiseError:
                pass  # /metrics outlives the engine: engine_up says what happened
            self.up.set(engine.error is None)
