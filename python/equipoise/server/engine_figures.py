"""The engine's own figures as Prometheus metrics: read when scraped, summed where they come about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from equipoise.engine.step_log import StepTotals
from equipoise.manager.commands import StatusReply
from equipoise.manager.reports import Phase


class EngineFigures(Collector):
    """Shows what the engine last said of itself; nothing before it has said something.

    Rebalances and steps are summed by rank 0 since its start. The sums are shown as they are, so however rarely they
    are scraped, no rebalance and no step is missed.
    """

    def __init__(self) -> None:
        self.status: StatusReply | None = None
        self.steps: list[StepTotals] | None = None

    def collect(self) -> Iterator[Metric]:
        if self.status is not None:
            yield from _balance(self.status)
            yield from _rebalances(self.status)
        if self.steps is not None:
            yield from _steps(self.steps)


def _balance(status: StatusReply) -> Iterator[Metric]:
    mean = status.mean_balancedness
    yield GaugeMetricFamily(
        "equipoise_balancedness_mean",
        "Mean over layers of mean rank load / maximum rank load, of the load window",
        float("nan") if mean is None else mean,
    )
    layers = GaugeMetricFamily(
        "equipoise_balancedness", "Mean rank load / maximum rank load, of the load window", labels=["layer"]
    )
    for layer, value in zip(status.layer_ids, status.balancedness, strict=True):
        if value is not None:
            layers.add_metric([str(layer)], value)
    yield layers
    if status.balance is not None:
        for name, text, figure in (
            ("balancedness_load_weighted", "Sum of mean / sum of maximum rank loads", status.balance.load_weighted),
            ("balancedness_worst", "Balancedness of the worst layer", status.balance.worst),
            ("balancedness_worst_layer", "Number of the worst layer", status.balance.worst_layer),
            ("par_mean", "Mean over layers of maximum / mean rank load", status.balance.par_mean),
            ("par_max", "Maximum over layers of maximum / mean rank load", status.balance.par_max),
            ("par_min", "Minimum over layers of maximum / mean rank load", status.balance.par_min),
        ):
            yield GaugeMetricFamily(f"equipoise_{name}", f"{text}, of the load window", figure)
    phases = GaugeMetricFamily("equipoise_phase", "1 for the phase the balancer is in", labels=["phase"])
    for phase in get_args(Phase):
        phases.add_metric([phase], phase == status.phase)
    yield phases
    yield GaugeMetricFamily(
        "equipoise_layers_pending", "Layers of a migration that have not committed yet", status.layers_pending
    )


def _rebalances(status: StatusReply) -> Iterator[Metric]:
    totals = status.totals
    outcomes = CounterMetricFamily(
        "equipoise_rebalances", "Rebalances that ended, periodic and requested ones", labels=["outcome"]
    )
    for outcome, count in totals.by_outcome.items():
        outcomes.add_metric([outcome], count)
    yield outcomes
    for name, text, value in (
        ("moves", "Slots that received an expert over the wire in committed rebalances", totals.moves),
        ("cross_node_moves", "Those of equipoise_moves_total that came from another node", totals.cross_node_moves),
        ("moved_bytes", "Bytes of experts that all ranks received in committed rebalances", totals.moved_bytes),
        ("stall_seconds", "Seconds that forward passes waited for rebalances", totals.stall_seconds),
    ):
        yield CounterMetricFamily(f"equipoise_{name}", text, value)


def _steps(totals: Sequence[StepTotals]) -> Iterator[Metric]:
    count = CounterMetricFamily("equipoise_steps", "Forward passes", labels=["phase"])
    seconds = HistogramMetricFamily(
        "equipoise_step_seconds", "Seconds of a forward pass with everything balancing added to it", labels=["phase"]
    )
    for phase in totals:
        count.add_metric([phase.phase], phase.num_steps)
        reached = accumulate(phase.durations.values())  # Prometheus counts a step in every bucket that holds it
        buckets = [(floatToGoString(bound), n) for bound, n in zip(phase.durations, reached, strict=True)]
        seconds.add_metric([phase.phase], buckets, sum_value=phase.seconds)
    yield count
    yield CounterMetricFamily(
        "equipoise_step_tokens", "Tokens of forward passes", sum(phase.num_tokens for phase in totals)
    )
    yield seconds
