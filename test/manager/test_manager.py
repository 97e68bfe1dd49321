"""The manager put together from its real parts, on ranks that are threads: what its options and hooks bring about."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise import EpTopology, ExpertLocationMetadata
from equipoise.algorithms.rebalance import rebalance_experts
from equipoise.config import EplbConfig
from equipoise.distributed.in_memory import InMemoryCommunicator, InMemoryHub
from equipoise.engine.step_log import GetSteps
from equipoise.errors import ConfigError
from equipoise.manager.command_handler import PendingReply
from equipoise.manager.commands import DumpRecording, GetStatus, Rebalance, StartRecording
from equipoise.manager.host import HostTraits
from equipoise.manager.manager import EplbManager
from equipoise.manager.reports import RebalanceReport
from equipoise.transfer.execution.updater import ExpertLocationUpdater
from equipoise.transfer.memory.store import ExpertWeights
from helpers.faults import Fault, FaultyCommunicator, FaultyMemory, ScheduledFaults, memory_of
from helpers.run_threads import results_of

TOPOLOGY = EpTopology(4, 2, 3)
LAYERS, EXPERTS = 2, 8


class ThreadHost:
    """Nearly all tokens of its steps go to experts 4 and 5, which only the first node holds at first."""

    def __init__(self, communicator: InMemoryCommunicator, transfers: InMemoryHub | None, **given: Any) -> None:
        hooks = {name: given.pop(name) for name in ("wall_clock",) if name in given}
        self.faults = ScheduledFaults(given.pop("faults", []), communicator.rank)
        traits = {name: given.pop(name) for name in ("on_report", "num_groups", "dispatch") if name in given}
        rank = communicator.rank
        self.metadata = ExpertLocationMetadata.trivial(LAYERS, EXPERTS, TOPOLOGY, max_replicas=5)
        held = self.metadata.physical_to_logical_map[:, list(TOPOLOGY.slots_of_rank(rank))]
        self.weights = [[(row[:, None] + torch.zeros(64)).float()] for row in held]
        options = {"eplb_algorithm": "deepseek", "ep_num_redundant_experts": 4, "eplb_transfer_timeout": 5.0, **given}
        self.manager = EplbManager(
            EplbConfig(**options),
            self.expert_weights(),
            self.metadata,
            communicator,
            transfer_communicator=(
                None if transfers is None else FaultyCommunicator(transfers.communicator(rank), self.faults)
            ),
            host=HostTraits(**traits),
            **hooks,
        )

    def expert_weights(self) -> ExpertWeights:
        if not self.faults.num_left:
            return self.weights
        return FaultyMemory(memory_of(self.weights, "checksum"), self.faults)  # type: ignore[return-value]

    def step(self) -> None:
        for layer in range(LAYERS):
            self.manager.route(layer, torch.tensor([[4, 5]] * 12 + [[layer, 6]]))
        self.manager.end_forward_pass(counted=True, num_tokens=13)
        self.manager.tick()

    def answer(self, ticket: PendingReply, *, idle: bool = False) -> Any:
        for _ in range(100_000):
            if ticket.done:
                return ticket.reply
            if idle:
                self.manager.tick()
            else:
                self.step()
        raise AssertionError("no answer")

    def rebalance(self, *, idle: bool = False, **fields: Any) -> RebalanceReport:
        self.step()
        report = self.answer(self.manager.submit(Rebalance(**fields)), idle=idle)
        assert isinstance(report, RebalanceReport)
        return report


def on_ranks(body: Callable[[ThreadHost], Any], **given: Any) -> list[Any]:
    """``body`` on every rank with a host of its own; ``on_report`` is a function of the rank."""
    transfers = InMemoryHub(TOPOLOGY.num_ranks)

    def run(communicator: InMemoryCommunicator) -> Any:
        mine = {name: of(communicator.rank) if name == "on_report" else of for name, of in given.items()}
        host = ThreadHost(communicator, transfers, **mine)
        try:
            return body(host)
        finally:
            host.manager.close()

    return results_of(run, TOPOLOGY.num_ranks)


def test_every_rank_is_told_of_every_rebalance_that_ends() -> None:
    told: dict[int, list[RebalanceReport]] = {rank: [] for rank in range(4)}

    def body(host: ThreadHost) -> list[RebalanceReport]:
        return [host.rebalance(dry_run=True), host.rebalance(), host.rebalance(max_moves_per_layer=0)]

    for rank, reports in enumerate(on_ranks(body, on_report=lambda rank: told[rank].append)):
        assert told[rank] == reports
        assert [report.outcome for report in reports] == ["dry_run", "committed", "skipped"]


def test_only_forward_passes_that_wait_are_stalled() -> None:
    def body(host: ThreadHost) -> tuple[RebalanceReport, RebalanceReport]:
        return host.rebalance(idle=True, dry_run=True), host.rebalance()

    for idle, busy in on_ranks(body):
        assert (idle.outcome, busy.outcome) == ("dry_run", "committed")
        assert idle.stall_seconds == 0.0 < idle.profile.gather_seconds
        assert busy.stall_seconds > busy.profile.gather_seconds > 0


@pytest.mark.parametrize(
    ("kind", "phase", "said"), [("corrupt", "verify", r"checksum"), ("drop", "transfer", r"within 0\.[45]\d* s")]
)
def test_checks_and_timeouts_are_those_of_the_options(kind: Any, phase: Any, said: str) -> None:
    def body(host: ThreadHost) -> tuple[RebalanceReport, bool]:
        before = host.metadata.physical_to_logical_map.clone()
        report = host.rebalance()
        return report, torch.equal(host.metadata.physical_to_logical_map, before)

    results = on_ranks(
        body,
        faults=[Fault(kind, sender, phase, layer=0) for sender in range(4)],
        eplb_verification="checksum",
        eplb_transfer_timeout=0.5,
    )
    for report, unchanged in results:
        assert (report.outcome, unchanged) == ("failed", True)
        assert re.search(said, str(report.error)), report.error


def test_bytes_are_told_per_rank_and_node() -> None:
    for report in on_ranks(ThreadHost.rebalance):
        sent, received = report.bytes_sent_per_rank, report.bytes_received_per_rank
        assert sum(sent) == sum(received) == report.bytes_moved > 0
        assert len(report.bytes_sent_per_node) == len(report.bytes_received_per_node) == 2
        leaves, enters = report.bytes_sent_per_node, report.bytes_received_per_node
        assert leaves == enters[::-1], "of two nodes, what leaves the one enters the other"
        assert leaves[0] > leaves[1], "the hot experts lie on the first"
        assert 0 < sum(leaves) <= report.bytes_moved


def test_groups_of_the_model_reach_the_algorithm() -> None:
    reports = on_ranks(lambda host: host.rebalance(algorithm="deepseek_hierarchical"), num_groups=3)
    assert all(report.outcome == "failed" and "num_groups" in str(report.error) for report in reports)


def test_a_dump_is_written_once_under_the_time_it_was_given(tmp_path: Path) -> None:
    def body(host: ThreadHost) -> Any:
        host.manager.submit(StartRecording())
        host.step()
        return host.manager.submit(DumpRecording(str(tmp_path))).reply

    replies = on_ranks(body, wall_clock=lambda: 86_400.25)
    assert [path.name for path in tmp_path.iterdir()] == ["expert_distribution_19700102T000000250_0-0.npz"]
    assert replies[0].path == str(next(tmp_path.iterdir()))
    assert replies[1:] == [None] * 3


def test_status_follows_a_rebalance() -> None:
    def body(host: ThreadHost) -> list[Any]:
        seen = [host.manager.submit(GetStatus()).reply]
        host.step()
        ticket = host.manager.submit(Rebalance())
        host.step()
        seen.append(host.manager.submit(GetStatus()).reply)
        report = host.answer(ticket)
        seen += [host.manager.submit(GetStatus()).reply, report]
        unknown = host.manager.submit(GetSteps()).reply  # the engine's to answer, not a manager's
        assert isinstance(unknown, ConfigError)
        return seen

    for first, during, after, report in on_ranks(body, enable_eplb=True):
        assert (first.phase, first.rank_load, first.mean_balancedness, first.window_steps) == (
            "collecting",
            [],
            None,
            0,
        )
        assert first.balancedness == [None, None]
        assert during.phase == "planning"
        assert during.forward_pass_id == 2
        assert [sum(load) for load in during.rank_load] == [2 * 4 * 26] * LAYERS  # steps x ranks x (tokens x choices)
        assert after.phase == "collecting"
        assert after.mean_balancedness > during.mean_balancedness
        assert (after.num_rebalances, after.last_report, after.layers_pending) == (1, report, 0)
        assert (after.enable_eplb, after.algorithm, after.num_ranks, after.num_nodes) == (True, "deepseek", 4, 2)
        assert (after.num_layers, after.num_logical_experts, after.num_physical_experts) == (2, 8, 12)


def test_options_that_cannot_work_are_refused_at_the_start() -> None:
    alone = InMemoryHub(TOPOLOGY.num_ranks).communicator(0)
    with pytest.raises(ConfigError, match="needs a transfer_communicator") as caught:
        ThreadHost(alone, None)
    assert caught.value.field == "eplb_transfer_mode"
    with pytest.raises(ConfigError) as caught:
        ThreadHost(alone, None, eplb_transfer_mode="sync", eplb_algorithm="best")
    assert caught.value.field == "eplb_algorithm"
    with pytest.raises(ConfigError) as caught:
        ThreadHost(alone, None, eplb_transfer_mode="chunked", eplb_staging_bytes=1)
    assert caught.value.field == "eplb_staging_bytes"


@pytest.mark.parametrize(("mode", "duty"), [("async", 0.25), ("chunked", 1.0), ("sync", 1.0)])
def test_transfers_rest_in_the_background_only(monkeypatch: pytest.MonkeyPatch, mode: str, duty: float) -> None:
    given = []

    def noted(*args: Any, **options: Any) -> ExpertLocationUpdater:
        given.append(options["duty"])
        return ExpertLocationUpdater(*args, **options)

    monkeypatch.setattr("equipoise.manager.weight_migration.ExpertLocationUpdater", noted)
    on_ranks(lambda host: host.manager.phase, eplb_transfer_mode=mode, eplb_transfer_duty=0.25)
    assert given == [duty] * TOPOLOGY.num_ranks


def test_the_choice_among_replicas_is_that_of_the_options() -> None:
    def body(host: ThreadHost) -> list[list[int]]:
        slots = []
        for _ in range(8):  # expert 0 lies in slots 0 and 8; a step has one token
            slots.append(host.manager.route(0, torch.tensor([[0]])).flatten().tolist())
            host.manager.end_forward_pass(counted=True, num_tokens=1)
        return slots

    near, far = {0: 0, 1: 0, 2: 8, 3: 8}, {0, 8}
    for rank, slots in enumerate(on_ranks(body, ep_dispatch_algorithm="static")):
        assert slots == [[near[rank]]] * 8
    for slots in on_ranks(body, ep_dispatch_algorithm="dynamic"):
        assert {slot for step in slots for slot in step} == far, "replicas take turns from step to step"


def test_close_ends_the_threads() -> None:
    before = set(threading.enumerate())
    on_ranks(lambda host: host.rebalance().outcome)
    left = [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("eplb-")]
    for thread in left:
        thread.join(5)
    assert not any(thread.is_alive() for thread in left)


@pytest.mark.parametrize(
    ("given", "dispatch"),
    [
        ({}, "weights"),
        ({"ep_dispatch_algorithm": "static"}, "weights"),
        ({"ep_dispatch_algorithm": "batch"}, "batch"),
        ({"dispatch": "even"}, "even"),  # the host's own, whatever the option says
    ],
)
def test_plans_are_made_for_the_dispatch_that_the_host_has(given: dict[str, Any], dispatch: str, monkeypatch) -> None:
    planned: list[tuple[str, int]] = []

    def plan(*args: Any, **options: Any) -> Any:
        planned.append((options["dispatch"], options["tokens_per_step"]))
        return rebalance_experts(*args, **options)

    monkeypatch.setattr("equipoise.manager.planning.rebalance_experts", plan)

    def body(host: ThreadHost) -> None:
        for _ in range(2):
            if dispatch != "even":
                host.step()
            else:
                host.manager.record_counts(torch.full((LAYERS, TOPOLOGY.num_slots), 2))
                host.manager.end_forward_pass(counted=True)
                host.manager.tick()
        host.answer(host.manager.submit(Rebalance()), idle=True)

    on_ranks(body, eplb_algorithm="equipoise", **given)
    tokens = {"even": 4 * 2 * TOPOLOGY.num_slots}.get(dispatch, 4 * 13 * 2)
    assert planned == [(dispatch, tokens)]


def test_an_algorithm_that_plans_for_another_dispatch_is_refused() -> None:
    def body(host: ThreadHost) -> str:
        reply = host.manager.submit(Rebalance(algorithm="reweight")).reply
        assert isinstance(reply, ConfigError)
        return str(reply)

    for message in on_ranks(body, ep_dispatch_algorithm="batch"):
        assert message == "algorithm reweight plans for dispatch weights, got dispatch='batch'"
    with pytest.raises(ConfigError, match="eplb_algorithm reweight plans for dispatch weights"):
        ThreadHost(InMemoryHub(4).communicator(0), None, eplb_algorithm="reweight", ep_dispatch_algorithm="batch")
