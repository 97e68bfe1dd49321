"""One rank raises somewhere in its tick: all ranks know in the next one, at the same tick, and none waits for it."""

from __future__ import annotations

import operator
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from equipoise import EpTopology, ExpertLocationMetadata
from equipoise.config import EplbConfig
from equipoise.distributed.in_memory import InMemoryCommunicator, InMemoryHub
from equipoise.manager.commands import Rebalance
from equipoise.manager.host import HostTraits
from equipoise.manager.live_placement import LivePlacement
from equipoise.manager.manager import EplbManager
from helpers.run_threads import results_of

TOPOLOGY = EpTopology(3, 1, 4)
LAYERS, EXPERTS = 2, 9
BAD_RANK = 1
SECONDS = 20.0  # a message that never comes is waited for three times as long
WHERE = threading.local()


class Host:
    """Layer 0 is uneven and will move; layer 1 is even."""

    def __init__(self, communicator: InMemoryCommunicator, transfers: InMemoryHub, mode: str) -> None:
        self.metadata = ExpertLocationMetadata.trivial(LAYERS, EXPERTS, TOPOLOGY, max_replicas=4)
        held = self.metadata.physical_to_logical_map[:, list(TOPOLOGY.slots_of_rank(communicator.rank))]
        self.reports: list[Any] = []
        self.manager = EplbManager(
            EplbConfig(
                eplb_algorithm="deepseek",
                ep_num_redundant_experts=3,
                eplb_transfer_timeout=5.0,
                eplb_transfer_mode=mode,  # type: ignore[arg-type]
            ),
            [[(row[:, None] + torch.zeros(64)).float()] for row in held],
            self.metadata,
            communicator,
            transfer_communicator=transfers.communicator(communicator.rank),
            host=HostTraits(on_report=self.reports.append),
        )

    def step(self) -> None:
        self.manager.route(0, torch.tensor([[4, 5]] * 12 + [[0, 6]]))
        self.manager.route(1, torch.arange(EXPERTS)[:, None])
        self.manager.end_forward_pass(counted=True, num_tokens=13)
        self.manager.tick()


def rebalance_on_ranks(break_it: Callable[[Host], None], mode: str = "async") -> list[tuple[str, int, str, list[Any]]]:
    """Asks for a rebalance with ``break_it`` applied on one rank: phase, steps until it was over, error, reports."""
    transfers = InMemoryHub(TOPOLOGY.num_ranks)

    def body(communicator: InMemoryCommunicator) -> tuple[str, int, str, list[Any]]:
        WHERE.rank = communicator.rank
        host = Host(communicator, transfers, mode)
        try:
            host.step()
            if communicator.rank == BAD_RANK:
                break_it(host)
            pending = host.manager.submit(Rebalance(force=True))
            start = time.monotonic()
            steps = 0
            while not pending.done or host.manager.wants_tick:
                host.step()
                steps += 1
            assert time.monotonic() - start < SECONDS, "a rank was waited for"
            return host.manager.phase, steps, str(host.manager._rebalancing.error), host.reports
        finally:
            host.manager.close()

    return results_of(body, TOPOLOGY.num_ranks)


def mistake(*_: object, **__: object) -> None:
    raise RuntimeError("a mistake")


PLACES = [
    "recorder.local_windows",
    "recorder.window_steps",
    "placement.snapshot",
    "_background.start",
    "_migration.begin",
    "_migration._runner.start",
    "_migration._placement.commit",
    "_rebalancing._reporter._report",
    "_rebalancing._reporter._on_report",
]


@pytest.mark.parametrize("mode", ["async", "chunked"])
@pytest.mark.parametrize("place", PLACES)
def test_all_ranks_stop_together_and_say_where_it_was(place: str, mode: str) -> None:
    def break_it(host: Host) -> None:
        owner, name = place.rsplit(".", 1)
        setattr(operator.attrgetter(owner)(host.manager), name, mistake)

    results = rebalance_on_ranks(break_it, mode)
    assert {(phase, steps) for phase, steps, _, _ in results} == {("failed", results[0][1])}
    assert all(f"rank {BAD_RANK}: " in error and "a mistake" in error for _, _, error, _ in results)


def test_plan_that_one_rank_cannot_read_is_followed_by_none(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = pickle.loads

    def fails_on_one(payload: bytes) -> Any:
        if getattr(WHERE, "rank", None) == BAD_RANK and threading.current_thread() is not threading.main_thread():
            raise MemoryError("a mistake")
        return loads(payload)

    monkeypatch.setattr("equipoise.manager.background_planner.pickle.loads", fails_on_one)
    results = rebalance_on_ranks(lambda _host: None)
    assert {(phase, steps) for phase, steps, _, _ in results} == {("collecting", results[0][1])}
    assert all(error == f"planning failed: rank {BAD_RANK}: MemoryError: a mistake" for _, _, error, _ in results)
    assert all([report.outcome for report in reports] == ["failed"] for *_, reports in results)


def test_nothing_broken_commits() -> None:
    """The rebalance that the others break moves experts and dispatch weights."""
    for _, _, _, reports in rebalance_on_ranks(lambda _host: None):
        assert [report.outcome for report in reports] == ["committed"]
        assert sum(reports[0].moves) > 0


@pytest.mark.parametrize("mode", ["async", "chunked", "sync"])
def test_nothing_more_commits_once_a_commit_has_failed_on_one_rank(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transfer's own messages tell of it, so all ranks know before any may commit the next batch."""
    committed: dict[int, int] = dict.fromkeys(range(TOPOLOGY.num_ranks), 0)
    commit = LivePlacement.commit

    def fails_on_one(placement: LivePlacement, target: ExpertLocationMetadata, rows: list[int]) -> None:
        committed[WHERE.rank] += 1
        if WHERE.rank == BAD_RANK:
            mistake()
        commit(placement, target, rows)

    def both_layers_uneven(host: Host) -> None:
        for layer in range(LAYERS):
            host.manager.route(layer, torch.tensor([[4, 5]] * 12 + [[0, 6]]))
        host.manager.end_forward_pass(counted=True, num_tokens=13)
        host.manager.tick()

    monkeypatch.setattr(Host, "step", both_layers_uneven)
    assert rebalance_on_ranks(lambda _host: None, mode)[0][3][0].profile.layers[1:], "one batch: nothing follows it"
    monkeypatch.setattr(LivePlacement, "commit", fails_on_one)
    results = rebalance_on_ranks(lambda _host: None, mode)
    assert {(phase, steps) for phase, steps, *_ in results} == {("failed", results[0][1])}
    assert all(f"rank {BAD_RANK}: " in error for _, _, error, _ in results)
    assert set(committed.values()) == {1}
