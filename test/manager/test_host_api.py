"""What a host engine needs of the manager, on ranks that are threads: its own layer numbers, counts and dispatch, maps
that follow, pauses, weights loaded anew, its own mover, and errors that never reach it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from equipoise import EpTopology, ExpertLocationMetadata
from equipoise.config import EplbConfig
from equipoise.distributed.in_memory import InMemoryCommunicator, InMemoryHub
from equipoise.errors import ConfigError, PhaseError
from equipoise.manager.commands import GetExpertLocation, GetStatus, Pause, Rebalance, Resume
from equipoise.manager.failures import FailureWatch
from equipoise.manager.host import HostTraits
from equipoise.manager.live_placement import LayersCommitted, LivePlacement
from equipoise.manager.manager import EplbManager
from equipoise.manager.migration import HostMigration
from equipoise.manager.reports import RebalanceReport
from helpers.faults import Fault, FaultyMemory, ScheduledFaults, memory_of
from helpers.run_threads import results_of

TOPOLOGY = EpTopology(4, 2, 3)
EXPERTS, HOST_LAYERS, LAYER_IDS = 8, 6, [2, 3, 5]  # layers 0, 1 and 4 are dense


class CountingHost:
    """Dispatches and counts by itself, as SGLang does; every rank counts the tokens of all ranks.

    Expert ``e`` of layer ``l`` has weights ``version + 100 l + e``, so what a slot holds can be read.
    """

    def __init__(self, communicator: InMemoryCommunicator, transfers: InMemoryHub, **given: Any) -> None:
        self.rank = communicator.rank
        self.communicator = communicator
        self.reports: list[RebalanceReport] = []
        self.raises_in = given.pop("raises_in", {}).get(self.rank)
        self.version = 0.0
        metadata = ExpertLocationMetadata.trivial(len(LAYER_IDS), EXPERTS, TOPOLOGY, max_replicas=5)
        self.map = {layer: metadata.physical_to_logical_map[row].clone() for row, layer in enumerate(LAYER_IDS)}
        self.slots = list(TOPOLOGY.slots_of_rank(self.rank))
        self.weights = [[torch.zeros(3, 64)] for _ in LAYER_IDS]
        self.load_weights(0.0)
        mover = given.pop("mover", None)
        options = {"eplb_algorithm": "deepseek", "ep_num_redundant_experts": 4, "eplb_transfer_timeout": 20.0, **given}
        faults = ScheduledFaults(given.pop("faults", []), self.rank)
        options.pop("faults", None)
        weights: Any = FaultyMemory(memory_of(self.weights, "canary"), faults) if faults.num_left else self.weights
        if mover is not None:
            weights = None
        self.manager = EplbManager(
            EplbConfig(**options),
            weights,
            metadata,
            communicator,
            transfer_communicator=transfers.communicator(self.rank),
            host=HostTraits(
                layer_ids=LAYER_IDS,
                dispatch="weights",
                replicated_counts=True,
                on_layers_committed=self.follow,
                on_report=self.note,
            ),
            migration=None if mover is None else lambda placement, failures: mover(self, placement, failures),
        )

    def load_weights(self, version: float) -> None:
        self.version = version
        for tensors, (layer, held) in zip(self.weights, self.map.items(), strict=True):
            tensors[0].copy_((version + 100 * layer + held[self.slots])[:, None].expand(3, 64))

    def follow(self, change: LayersCommitted) -> None:
        assert change.layer_ids == [LAYER_IDS[row] for row in change.rows]
        for layer, row in zip(change.layer_ids, change.rows, strict=True):
            self.map[layer] = change.placement.physical_to_logical_map[row].clone()
        if self.raises_in == "on_layers_committed":
            raise RuntimeError("the host's maps cannot follow")

    def note(self, report: RebalanceReport) -> None:
        self.reports.append(report)
        if self.raises_in == "on_report":
            raise RuntimeError("the host cannot note it")

    def check(self) -> None:
        """The host's maps, ours, the weights and the other ranks all say the same."""
        placement = self.manager.placement
        for row, layer in enumerate(LAYER_IDS):
            assert self.map[layer].equal(placement.metadata.physical_to_logical_map[row])
            assert self.map[layer].equal(placement.committed.physical_to_logical_map[row])
            held = self.weights[row][0][:, 0] - self.version - 100 * layer
            assert held.tolist() == self.map[layer][self.slots].tolist()
        maps = self.communicator.all_gather_object({layer: row.tolist() for layer, row in self.map.items()})
        assert all(other == maps[0] for other in maps)

    def step(self, *, check: bool = True) -> None:
        if check:
            self.check()
        counts = torch.zeros(HOST_LAYERS, TOPOLOGY.num_slots, dtype=torch.int32)
        for layer, held in self.map.items():
            for expert in range(EXPERTS):
                counts[layer, (held == expert).nonzero()[0]] = 50 if expert in (4, 5) else 1
        counts[[0, 1, 4]] = 10_000  # of dense layers: not load
        self.manager.record_counts(counts)
        self.manager.end_forward_pass(counted=True)
        if self.raises_in == "recorder":
            self.manager.recorder.local_windows = None  # type: ignore[method-assign, assignment]
        self.manager.tick()

    def until(self, condition: Callable[[], bool], *, check: bool = True) -> None:
        for _ in range(100_000):
            if condition():
                return
            self.step(check=check)
        raise AssertionError("it never came about")

    def rebalance(self, **fields: Any) -> Any:
        self.step()
        pending = self.manager.submit(Rebalance(**fields))
        self.until(lambda: pending.done)
        self.check()
        return pending.reply


def on_ranks(body: Callable[[CountingHost], Any], **given: Any) -> list[Any]:
    transfers = InMemoryHub(TOPOLOGY.num_ranks)

    def run(communicator: InMemoryCommunicator) -> Any:
        host = CountingHost(communicator, transfers, **given)
        try:
            return body(host)
        finally:
            host.manager.close()

    return results_of(run, TOPOLOGY.num_ranks)


def test_a_host_with_dense_layers_gets_its_own_numbers_back() -> None:
    def body(host: CountingHost) -> Any:
        report = host.rebalance()
        return report, host.manager.submit(GetStatus()).result(), host.manager.submit(GetExpertLocation()).result()

    for report, status, location in on_ranks(body):
        assert (report.outcome, report.layer_ids) == ("committed", LAYER_IDS)
        assert {profile.layer_id for profile in report.profile.layers} == set(LAYER_IDS)
        assert (status.layer_ids, location.layer_ids) == (LAYER_IDS, LAYER_IDS)
        for load in status.rank_load:  # of one rank, not of four times as many tokens
            assert sum(load) == pytest.approx((2 * 50 + 6) * status.window_steps)
        assert report.mean_balancedness_after > report.mean_balancedness_before
        assert report.balance_before.mean == pytest.approx(report.mean_balancedness_before)
        assert report.balance_after.load_weighted > report.balance_before.load_weighted
        assert report.balance_after.worst_layer in LAYER_IDS


@pytest.mark.parametrize("layer_ids", [[1, 2], [1, 2, 2], [-1, 0, 1]])
def test_layer_numbers_must_name_each_layer_once(layer_ids: list[int]) -> None:
    metadata = ExpertLocationMetadata.trivial(3, EXPERTS, TOPOLOGY)
    with pytest.raises(ConfigError) as caught:
        LivePlacement(metadata, layer_ids)
    assert caught.value.field == "layer_ids"


@pytest.mark.parametrize("mode", ["async", "chunked", "sync"])
def test_ticks_run_under_inference_mode(mode: str) -> None:
    def body(host: CountingHost) -> list[str]:
        with torch.inference_mode():
            return [host.rebalance(force=True).outcome for _ in range(2)]

    assert {outcome for result in on_ranks(body, eplb_transfer_mode=mode) for outcome in result} <= {
        "committed",
        "skipped",
    }


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 6])
def test_a_pause_returns_once_nothing_moves_and_rebalances_go_on_after_resume(steps: int) -> None:
    def body(host: CountingHost) -> Any:
        host.step()
        pending = host.manager.submit(Rebalance())
        for _ in range(steps):
            host.step()
        host.manager.pause("weights go away")
        assert pending.done
        assert host.manager.phase == "paused"
        before = {layer: held.clone() for layer, held in host.map.items()}
        assert isinstance(host.manager.submit(Rebalance()).reply, PhaseError)
        for _ in range(5):
            host.step()
        assert all(before[layer].equal(held) for layer, held in host.map.items())
        assert "weights go away" in str(host.manager.submit(GetStatus()).result().error)
        host.manager.resume()
        return pending.reply.outcome, host.rebalance(force=True).outcome

    results = on_ranks(body)
    assert {outcome for outcome, _ in results} <= {"cancelled", "committed"}
    assert {again for _, again in results} <= {"committed", "skipped"}
    if steps == 0:
        assert results[0] == ("cancelled", "committed")


def test_pause_and_resume_are_commands_too() -> None:
    def body(host: CountingHost) -> Any:
        pending = host.manager.submit(Pause("an operator"))
        host.until(lambda: pending.done)
        assert (pending.result(), host.manager.phase) == (None, "paused")
        host.manager.submit(Resume()).result()
        return host.manager.phase

    assert on_ranks(body) == ["collecting"] * TOPOLOGY.num_ranks


@pytest.mark.parametrize("mode", ["async", "chunked"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_weights_loaded_anew_are_never_overwritten_by_old_ones(mode: str, steps: int) -> None:
    def body(host: CountingHost) -> Any:
        host.step()
        pending = host.manager.submit(Rebalance())
        for _ in range(steps):
            host.step()
        host.communicator.barrier()
        host.load_weights(10_000.0)
        host.manager.weights_changed()
        host.until(lambda: pending.done)
        first = pending.reply
        host.load_weights(20_000.0)
        host.manager.weights_changed()
        return first.outcome, host.rebalance(force=True).outcome

    for first, second in on_ranks(body, eplb_transfer_mode=mode, eplb_verification="checksum"):
        assert first in ("cancelled", "committed")
        assert second in ("committed", "skipped")


@pytest.mark.parametrize("place", ["on_report", "on_layers_committed", "recorder"])
@pytest.mark.parametrize("mode", ["async", "sync"])
def test_an_error_on_one_rank_is_phase_failed_on_all_and_reaches_no_host(place: str, mode: str) -> None:
    def body(host: CountingHost) -> Any:
        host.step()
        pending = host.manager.submit(Rebalance())
        host.until(lambda: host.manager.phase == "failed")
        for _ in range(3):
            host.step()
        refused = host.manager.submit(Rebalance()).reply
        return pending.done, str(refused), host.manager.wants_tick

    for done, refused, wants_tick in on_ranks(body, raises_in={2: place}, eplb_transfer_mode=mode):
        assert (done, wants_tick) == (True, False)
        assert "rank 2: " in refused


def test_a_commit_that_fails_on_one_rank_ends_balancing_on_all() -> None:
    def body(host: CountingHost) -> str:
        host.step()
        host.manager.submit(Rebalance())
        host.until(lambda: host.manager.phase == "failed", check=False)
        host.step(check=False)
        return str(host.manager.submit(GetStatus()).result().error)

    for error in on_ranks(body, faults=[Fault("raise", 1, "commit", layer=1)]):
        assert "rank 1: a commit; weights of this rank may be half written, restart it" in error


def host_mover(layers_per_tick: int | None) -> Callable[..., HostMigration]:
    def make(host: CountingHost, placement: LivePlacement, failures: FailureWatch) -> HostMigration:
        def move(target: ExpertLocationMetadata, layer_ids: list[int]) -> None:
            every = host.communicator.all_gather_object([tensors[0].clone() for tensors in host.weights])
            if host.raises_in == "mover":
                raise RuntimeError("a cable was pulled")
            for layer in layer_ids:
                row = LAYER_IDS.index(layer)
                for local, slot in enumerate(host.slots):
                    source = int((host.map[layer] == target.physical_to_logical_map[row, slot]).nonzero()[0])
                    rank, index = divmod(source, TOPOLOGY.slots_per_rank)
                    host.weights[row][0][local].copy_(every[rank][row][index])

        return HostMigration(placement, move, failures, layers_per_tick=layers_per_tick)

    return make


@pytest.mark.parametrize("layers_per_tick", [1, None])
def test_a_hosts_own_mover_carries_out_our_plans(layers_per_tick: int | None) -> None:
    def body(host: CountingHost) -> RebalanceReport:
        report = host.rebalance()
        assert isinstance(report, RebalanceReport)
        assert host.rebalance(algorithm="reweight").outcome in ("committed", "skipped")
        return report

    for report in on_ranks(body, mover=host_mover(layers_per_tick)):
        assert (report.outcome, report.bytes_moved) == ("committed", 0)
        assert sum(report.moves) > 0
        assert [profile.layer_id for profile in report.profile.layers] == LAYER_IDS


def test_a_hosts_mover_that_raises_on_one_rank_ends_balancing_on_all() -> None:
    def body(host: CountingHost) -> str:
        host.step()
        host.manager.submit(Rebalance())
        host.until(lambda: host.manager.phase == "failed", check=False)
        return str(host.manager.submit(GetStatus()).result().error)

    for error in on_ranks(body, mover=host_mover(1), raises_in={3: "mover"}):
        assert "rank 3: the host's mover, with layers [2]: RuntimeError: a cable was pulled" in error


def test_log_records_carry_their_rank_and_reports_are_seen_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="equipoise.manager")
    on_ranks(CountingHost.rebalance)
    lines = [record for record in caplog.records if "rebalance after step" in record.message]
    assert sorted((record.rank, record.levelname) for record in lines) == [  # type: ignore[attr-defined]
        (0, "INFO"), (1, "DEBUG"), (2, "DEBUG"), (3, "DEBUG"),
    ]  # fmt: skip


def test_an_error_is_logged_with_its_traceback_by_the_rank_that_has_it(caplog: pytest.LogCaptureFixture) -> None:
    def body(host: CountingHost) -> None:
        host.step()
        host.manager.submit(Rebalance())
        host.until(lambda: host.manager.phase == "failed")

    on_ranks(body, raises_in={2: "on_layers_committed"})
    (record, *_) = [record for record in caplog.records if record.exc_info]
    assert record.rank == 2  # type: ignore[attr-defined]
    assert "the host's maps cannot follow" in str(record.exc_info)
