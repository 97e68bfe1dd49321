"""The manager's loop on real gloo ranks. Each rank's weights carry their expert's id, so maps and weights can be held
against each other before every forward pass."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist

from equipoise import EpTopology, ExpertLocationMetadata
from equipoise.config import EplbConfig
from equipoise.distributed.communicator import TorchCommunicator
from equipoise.errors import ConfigError, PhaseError
from equipoise.load.trace import LoadTrace
from equipoise.manager.command_handler import PendingReply
from equipoise.manager.commands import (
    DumpRecording,
    GetExpertLocation,
    GetStatus,
    Rebalance,
    StartRecording,
    StopRecording,
)
from equipoise.manager.host import HostTraits
from equipoise.manager.manager import EplbManager
from equipoise.manager.reports import RebalanceReport, RebalanceTotals
from helpers.faults import Fault, FaultyCommunicator, ScheduledFaults
from helpers.run_ranks import run_ranks

LAYERS, EXPERTS, REDUNDANT = 3, 8, 4


class GlooHost:
    """A minimal engine: random skewed routing in place of a model, and the check of what a forward pass would see."""

    def __init__(self, rank: int, world_size: int, faults: tuple[Fault, ...] = (), **options: Any) -> None:
        topology = EpTopology.for_experts(EXPERTS, REDUNDANT, world_size, num_nodes=2)
        self.metadata = ExpertLocationMetadata.trivial(LAYERS, EXPERTS, topology, max_replicas=REDUNDANT + 1)
        mine = self.metadata.physical_to_logical_map[:, list(topology.slots_of_rank(rank))]
        self.weights = [
            [
                (row[:, None] + 100 * layer + torch.zeros(1, 4)).to(torch.bfloat16),
                (row[:, None, None] + torch.zeros(1, 2, 3)).to(torch.uint8),
            ]
            for layer, row in enumerate(mine)
        ]
        self.reports: list[RebalanceReport] = []
        self.slots = topology.slots_of_rank(rank)
        self.communicator = TorchCommunicator(dist.group.WORLD)
        for_transfers = TorchCommunicator(
            dist.new_group(), control_group=dist.new_group(), new_group=lambda: dist.new_group()
        )
        options = {"eplb_algorithm": "deepseek", "ep_num_redundant_experts": REDUNDANT, **options}
        self.manager = EplbManager(
            EplbConfig(**options),
            self.weights,
            self.metadata,
            self.communicator,
            transfer_communicator=FaultyCommunicator(for_transfers, ScheduledFaults(faults, rank)),
            host=HostTraits(on_report=self.reports.append),
        )
        self.manager.warm_up()
        self.random = torch.Generator().manual_seed(rank)

    def check(self) -> None:
        """Maps agree with each other, with the weights of this rank, and with all other ranks."""
        self.metadata.check_integrity()
        for layer in range(LAYERS):
            held = self.metadata.physical_to_logical_map[layer, list(self.slots)]
            assert (self.weights[layer][0][:, 0].float() - 100 * layer).tolist() == held.tolist()
            assert self.weights[layer][1][:, 0, 0].tolist() == held.tolist()
        maps = self.communicator.all_gather_object(self.metadata.physical_to_logical_map.tolist())
        assert all(other == maps[0] for other in maps)

    def step(self, hot: int, *, counted: bool = True, tokens: int = 16) -> None:
        self.check()
        for layer in range(LAYERS):
            topk = torch.randint(0, EXPERTS, (tokens, 2), generator=self.random)
            topk[torch.rand(tokens, generator=self.random) < 0.7, 0] = hot
            slots = self.manager.route(layer, topk)
            assert torch.equal(self.metadata.physical_to_logical_map[layer][slots], topk)
        self.manager.end_forward_pass(counted=counted, num_tokens=tokens)
        self.manager.tick()

    def finish(self, ticket: PendingReply, hot: int | None) -> Any:
        """Steps, or ticks idly if ``hot`` is None, until the command is answered."""
        for _ in range(1_000_000):  # the first plan may wait for its kernels to compile; run_ranks ends what never ends
            if ticket.done:
                return ticket.reply
            if hot is None:
                assert self.manager.wants_tick
                self.manager.tick()
            else:
                self.step(hot)
        raise AssertionError("no answer")


def rebalance_while_stepping(rank: int, world_size: int, idle: bool) -> dict[str, Any]:
    host = GlooHost(rank, world_size)
    before = host.metadata.physical_to_logical_map.clone()
    addresses = host.metadata.physical_to_logical_map.data_ptr()
    for _ in range(6):
        host.step(hot=1)
    dry = host.finish(host.manager.submit(Rebalance(dry_run=True)), None if idle else 1)
    assert torch.equal(host.metadata.physical_to_logical_map, before)
    ticket = host.manager.submit(Rebalance())
    refused = host.manager.submit(Rebalance())
    assert isinstance(refused.reply, PhaseError)
    report = host.finish(ticket, None if idle else 1)
    host.check()
    assert host.metadata.physical_to_logical_map.data_ptr() == addresses
    host.manager.tick()  # all ranks hear that the end went well everywhere
    assert not host.manager.wants_tick
    status = host.manager.submit(GetStatus()).reply
    return {"dry": dry, "report": report, "status": status, "map": host.metadata.physical_to_logical_map.tolist()}


@pytest.mark.parametrize(("world_size", "idle"), [(2, True), (4, False)])
def test_a_requested_rebalance_moves_experts_between_steps(world_size: int, idle: bool) -> None:
    results = run_ranks(rebalance_while_stepping, world_size, idle)
    for result in results:
        dry, report = result["dry"], result["report"]
        assert (dry.outcome, report.outcome, report.action) == ("dry_run", "committed", "migrate")
        assert dry.bytes_moved == 0
        assert report.mean_balancedness_after > report.mean_balancedness_before
        assert sum(report.moves) > 0
        # At most one message per move (a slot may free rider with another of its rank), padded to whole cache lines.
        assert 0 < report.bytes_moved <= sum(report.moves) * 3 * 64
        assert sum(report.bytes_sent_per_rank) == report.bytes_moved
        assert sum(report.bytes_sent_per_node) == sum(report.bytes_received_per_node) <= report.bytes_moved
        assert result["status"].num_rebalances == 1
        assert result["status"].phase == "collecting"
        assert result["map"] == results[0]["map"]
        assert report.reason == results[0]["report"].reason
        assert report.bytes_sent_per_rank == results[0]["report"].bytes_sent_per_rank


def rebalance_periodically(rank: int, world_size: int) -> tuple[list[RebalanceReport], RebalanceTotals]:
    host = GlooHost(rank, world_size, enable_eplb=True, eplb_rebalance_num_iterations=12)
    found: list[RebalanceReport] = []
    for _ in range(20_000):  # the first plan may wait for its kernels to compile
        host.step(hot=2 * (len(found) // 2))  # another expert is hot after every second rebalance
        if host.reports[len(found) :]:
            found.append(host.reports[len(found)])
            if len(found) == 8:
                break
    return found, host.manager.submit(GetStatus()).reply.totals


def test_periodic_rebalances_follow_a_shifting_load_alike_on_all_ranks() -> None:
    results = run_ranks(rebalance_periodically, 4)
    for reports, totals in results:
        assert len(reports) == 8
        steps = [report.forward_pass_id for report in reports]
        assert steps == [report.forward_pass_id for report in results[0][0]]
        assert min(after - before for before, after in pairwise(steps)) >= 12
        assert {report.outcome for report in reports} <= {"committed", "skipped"}
        assert sum(report.outcome == "committed" for report in reports) >= 4
        assert all(report.mean_balancedness_after > 0.8 for report in reports)
        # Nobody asked in between: what there is to sum up is kept where rebalances end.
        committed = [report for report in reports if report.outcome == "committed"]
        assert totals.by_outcome == {
            "committed": len(committed), "skipped": 8 - len(committed), "dry_run": 0, "cancelled": 0,
            "failed": 0,
        }  # fmt: skip
        assert totals.moves == sum(sum(report.moves) for report in committed) > 0
        assert totals.cross_node_moves == sum(sum(report.cross_node_moves) for report in committed)
        assert totals.moved_bytes == sum(report.bytes_moved for report in reports) > 0
        assert totals.stall_seconds == pytest.approx(sum(report.stall_seconds for report in reports))


def hold_back(rank: int, world_size: int) -> list[RebalanceReport]:
    host = GlooHost(rank, world_size, enable_eplb=True, eplb_min_rebalancing_utilization_threshold=0.2)
    reports = []
    for _ in range(3):  # idle and warm-up steps are no load
        host.step(hot=1, counted=False)
    reports.append(host.finish(host.manager.submit(Rebalance()), None))
    for _ in range(5):
        host.step(hot=1)
    reports.append(host.finish(host.manager.submit(Rebalance(window_steps=2, max_moves_per_layer=0)), None))
    reports.append(host.finish(host.manager.submit(Rebalance(window_steps=2)), None))
    assert isinstance(host.manager.submit(Rebalance(algorithm="nonsense")).reply, ConfigError)
    assert isinstance(host.manager.submit(Rebalance(window_steps=0)).reply, ConfigError)
    host.check()
    return reports


def test_what_holds_a_rebalance_back_is_said() -> None:
    empty, limited, free = run_ranks(hold_back, 2)[0]
    assert (empty.outcome, empty.mean_balancedness_before) == ("skipped", None)
    assert "no token" in empty.reason
    assert (limited.outcome, sum(limited.slots_changed)) == ("skipped", 0)
    assert "equals the present placement" in limited.reason
    assert (free.outcome, free.window_steps) == ("committed", 2)


def fail_in_the_middle(rank: int, world_size: int, mode: str, fault: Fault) -> dict[str, Any]:
    host = GlooHost(rank, world_size, (fault,), eplb_transfer_mode=mode, eplb_transfer_timeout=2.0)
    for _ in range(4):
        host.step(hot=1)
    before = host.metadata.physical_to_logical_map.clone()
    failed = host.finish(host.manager.submit(Rebalance(force=True)), 1)
    host.check()
    after_failure = host.metadata.physical_to_logical_map.clone()
    assert not torch.equal(after_failure[0], before[0])  # committed before the failure
    assert torch.equal(after_failure[1:], before[1:])
    repaired = host.finish(host.manager.submit(Rebalance(force=True)), 1)
    host.check()
    return {"failed": failed, "repaired": repaired}


@pytest.mark.parametrize("mode", ["sync", "chunked", "async"])
@pytest.mark.parametrize("kind", ["raise", "drop"])
def test_after_a_failure_the_old_layers_serve_on_and_the_next_rebalance_succeeds(mode: str, kind: str) -> None:
    fault = Fault(kind, rank=1, phase="transfer", layer=1)  # type: ignore[arg-type]
    results = run_ranks(fail_in_the_middle, 2, mode, fault)
    for result in results:
        assert result["failed"].outcome == "failed"
        assert "layer 1 was not migrated" in result["failed"].error
        repaired = result["repaired"]
        assert (repaired.outcome, repaired.error) == ("committed", None), repaired.reason


def record_and_dump(rank: int, world_size: int, directory: str) -> dict[str, Any]:
    host = GlooHost(rank, world_size, expert_distribution_recorder_mode="per_pass")
    manager = host.manager
    errors = [manager.submit(command).reply for command in (StopRecording(), DumpRecording(directory))]
    host.step(hot=2)
    manager.submit(StartRecording())
    for _ in range(5):
        host.step(hot=2)
    manager.submit(StopRecording())
    host.step(hot=2)
    dump = manager.submit(DumpRecording(directory)).reply
    missing = manager.submit(DumpRecording(directory + "/nowhere")).reply
    return {"errors": errors, "dump": dump, "missing": missing, "location": manager.submit(GetExpertLocation()).reply}


def test_a_recording_is_dumped_whole_and_reads_back(tmp_path: Any) -> None:
    result = run_ranks(record_and_dump, 2, str(tmp_path))[0]
    assert all(isinstance(error, PhaseError) for error in result["errors"])
    assert isinstance(result["missing"], ConfigError)
    trace = LoadTrace.open(result["dump"].path)
    assert trace.logical_count.shape == (5, LAYERS, EXPERTS)
    assert trace.logical_count.sum((1, 2)).tolist() == [2 * 16 * 2 * LAYERS] * 5  # ranks x tokens x k x layers
    assert trace.forward_pass_ids.tolist() == [1, 2, 3, 4, 5]
    assert trace.physical_count is not None
    assert trace.physical_count.sum() == trace.logical_count.sum()
    assert trace.physical_to_logical_map is not None
    assert trace.physical_to_logical_map.tolist() == result["location"].physical_to_logical_map
    assert result["dump"].num_tokens == trace.logical_count.sum((0, 2)).max()
    assert [path.name for path in tmp_path.iterdir()] == [result["dump"].path.rsplit("/", 1)[1]]
