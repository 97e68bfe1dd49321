"""What a scheduler adds to SGLang's /metrics, from a balancer that runs on one rank."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prometheus_client import REGISTRY, generate_latest

from equipoise.hosts.sglang.metrics import RebalanceMetrics
from equipoise.manager.commands import Pause, Rebalance, Resume
from helpers.sglang_scheduler import Scheduler, on_ranks


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> Iterator[RebalanceMetrics]:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "set by SGLang")
    before = set(REGISTRY._collector_to_names)
    yield RebalanceMetrics()
    for collector in set(REGISTRY._collector_to_names) - before:
        REGISTRY.unregister(collector)


def phases() -> list[str]:
    lines = generate_latest().decode().splitlines()
    shown = [line.split('"')[1] for line in lines if line.startswith("equipoise_phase{") and line.endswith(" 1.0")]
    return sorted(set(shown))


def test_phase_and_balance_of_each_layer_are_shown(metrics: RebalanceMetrics) -> None:
    def body(scheduler: Scheduler) -> None:
        if scheduler.rank == 0:
            scheduler.balancer._on_phase = metrics.show_phase
        scheduler.forward()
        report = scheduler.ask(Rebalance())
        assert report.outcome == "committed"
        if scheduler.rank == 0:
            metrics.ended(report)
            assert phases() == ["collecting"]
        scheduler.ask(Pause("a test"))
        if scheduler.rank == 0:
            assert phases() == ["paused"]
        scheduler.ask(Resume())

    on_ranks(body)
    shown = generate_latest().decode()
    assert phases() == ["collecting"]
    assert 'equipoise_balancedness{layer="1"} 1.0' in shown  # even; SGLang's numbers, its layer 0 is dense
    assert 'equipoise_balancedness{layer="0"}' not in shown
    assert 'equipoise_rebalances_total{outcome="committed"} 1.0' in shown


def test_without_sglangs_metrics_nothing_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    before = set(REGISTRY._collector_to_names)
    RebalanceMetrics().show_phase("failed")
    assert set(REGISTRY._collector_to_names) == before
