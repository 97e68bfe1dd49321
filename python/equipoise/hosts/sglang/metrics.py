"""Our figures in SGLang's ``/metrics``, which shows what any of its processes registers in multi-process mode."""

from __future__ import annotations

import os
from typing import get_args

from equipoise.manager.reports import Phase, RebalanceReport


class RebalanceMetrics:
    """Of the scheduler with rank 0. Does nothing without ``--enable-metrics``.

    Made once SGLang has set ``PROMETHEUS_MULTIPROC_DIR``: prometheus_client reads it when it is imported.
    """

    def __init__(self) -> None:
        self._made = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        self._phase: Phase | None = None
        if not self._made:
            return
        from prometheus_client import Counter, Gauge

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"equipoise_{name}", text, labels)

        self._rebalances = counter("rebalances", "Rebalances that ended, periodic and requested ones", ("outcome",))
        self._moves = counter("moves", "Slots that received an expert over the wire in committed rebalances")
        self._cross_node_moves = counter("cross_node_moves", "Those of equipoise_moves_total from another node")
        self._moved_bytes = counter("moved_bytes", "Bytes of experts that all ranks received")
        self._stall_seconds = counter("stall_seconds", "Seconds that forward passes waited for rebalances")

        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"equipoise_{name}", text, labels, multiprocess_mode="mostrecent")

        ratio = "mean rank load / maximum rank load, of the last rebalance's load window, before it"
        self._mean = gauge("balancedness_mean", f"Mean over layers of {ratio}")
        self._layers = gauge("balancedness", ratio.capitalize(), ("layer",))
        self._phases = gauge("phase", "1 for the phase the balancer is in", ("phase",))
        self.show_phase("collecting")

    def ended(self, report: RebalanceReport) -> None:
        """Adds a rebalance that has ended."""
        if not self._made:
            return
        self._rebalances.labels(report.outcome).inc()
        self._moved_bytes.inc(report.bytes_moved)
        self._stall_seconds.inc(report.stall_seconds)
        if report.outcome == "committed":
            self._moves.inc(sum(report.moves))
            self._cross_node_moves.inc(sum(report.cross_node_moves))
        if report.mean_balancedness_before is not None:
            self._mean.set(report.mean_balancedness_before)
        for layer, value in zip(report.layer_ids, report.balancedness_before, strict=True):
            if value is not None:
                self._layers.labels(layer).set(value)

    def show_phase(self, phase: Phase) -> None:
        """Called as often as one likes: a phase is written when it begins."""
        if not self._made or phase == self._phase:
            return
        self._phase = phase
        for name in get_args(Phase):
            self._phases.labels(name).set(name == phase)
