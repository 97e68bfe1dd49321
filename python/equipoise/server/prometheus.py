"""What /metrics shows, in a registry of its own: two servers in one process do not meet."""

from __future__ import annotations

import asyncio
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from equipoise.commands import GetStatus, GetSteps, Outcome, Phase, RebalanceReport, StatusReply, StepRecord
from equipoise.errors import EquipoiseError
from equipoise.server.engine_protocol import ServingEngine

_STEP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_NO_REPORT: tuple[str, int] = ("", -1)


class ServerMetrics:
    """Counts requests as they come; asks the engine for the rest when scraped.

    The engine counts committed rebalances itself. What else a rebalance did (moves, bytes, stall) is taken from its
    report: one that was not asked for over HTTP is seen if it is still the last one at the next scrape.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._refreshing = asyncio.Lock()
        self._next_step = 0
        self._committed = 0
        self._seen_report = _NO_REPORT

        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"equipoise_{name}", text, labels, registry=registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"equipoise_{name}", text, labels, registry=registry)

        self.up = gauge("engine_up", "1 while the engine lives")
        self.running = gauge("running_requests", "Requests that have not finished, waiting ones included")
        self.requests = counter(
            "requests", "Requests by how they ended: stop, length, abort, refused or error", ("finish_reason",)
        )
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts that got an answer")
        self.generated_tokens = counter("generated_tokens", "Tokens answered")
        self.mean_balancedness = gauge(
            "balancedness_mean", "Mean over layers of mean rank load / maximum rank load, of the load window"
        )
        self.balancedness = gauge("balancedness", "Mean rank load / maximum rank load, of the load window", ("layer",))
        self.phase = gauge("phase", "1 for the phase the balancer is in", ("phase",))
        self.layers_pending = gauge("layers_pending", "Layers of a migration that have not committed yet")
        self.rebalances = counter("rebalances", "Rebalances by outcome", ("outcome",))
        self.moves = counter("moves", "Slots that received an expert over the wire")
        self.cross_node_moves = counter("cross_node_moves", "Slots that received an expert from another node")
        self.moved_bytes = counter("moved_bytes", "Bytes of experts received by all ranks")
        self.stall_seconds = counter("stall_seconds", "Seconds that forward passes waited for rebalances")
        self.steps = counter("steps", "Forward passes", ("phase",))
        self.step_tokens = counter("step_tokens", "Tokens of forward passes")
        self.step_seconds = Histogram(
            "equipoise_step_seconds",
            "Seconds of a forward pass with everything balancing added to it",
            ("phase",),
            buckets=_STEP_SECONDS,
            registry=registry,
        )
        for outcome in get_args(Outcome):
            self.rebalances.labels(outcome)

    def request_ended(self, finish_reason: str) -> None:
        self.running.dec()
        self.requests.labels(finish_reason).inc()

    def saw_report(self, report: RebalanceReport) -> None:
        """Counts a rebalance, once however often it is seen."""
        key = (report.outcome, report.forward_pass_id)
        if key == self._seen_report and report.outcome != "dry_run":
            return
        self._seen_report = key
        if report.outcome != "committed":  # those are counted from the status
            self.rebalances.labels(report.outcome).inc()
        else:
            self.moves.inc(sum(report.moves))
            self.cross_node_moves.inc(sum(report.cross_node_moves))
        self.moved_bytes.inc(report.bytes_moved)
        self.stall_seconds.inc(report.stall_seconds)

    async def refresh(self, engine: ServingEngine) -> None:
        """Brings the figures that the engine holds up to date. A dead engine leaves them as they were."""
        async with self._refreshing:
            try:
                if engine.error is None:
                    self._saw_status(await engine.control(GetStatus()))
                    self._saw_steps(await engine.control(GetSteps(self._next_step)))
            except EquipoiseError:
                pass  # /metrics outlives the engine: engine_up says what happened
            self.up.set(engine.error is None)

    def _saw_status(self, status: StatusReply) -> None:
        mean = status.mean_balancedness
        self.mean_balancedness.set(float("nan") if mean is None else mean)
        self.balancedness.clear()
        for layer, value in enumerate(status.balancedness):
            if value is not None:
                self.balancedness.labels(layer).set(value)
        for phase in get_args(Phase):
            self.phase.labels(phase).set(phase == status.phase)
        self.layers_pending.set(status.layers_pending)
        self.rebalances.labels("committed").inc(status.num_rebalances - self._committed)
        self._committed = status.num_rebalances
        if status.last_report is not None and status.last_report.outcome != "dry_run":
            self.saw_report(status.last_report)

    def _saw_steps(self, steps: list[StepRecord]) -> None:
        for step in steps:
            self._next_step = max(self._next_step, step.forward_pass_id + 1)
            self.steps.labels(step.phase).inc()
            self.step_tokens.inc(step.num_tokens)
            self.step_seconds.labels(step.phase).observe(step.seconds)
