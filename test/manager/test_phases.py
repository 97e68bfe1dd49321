"""The phase machine by itself: one rank, a clock that is set by hand, and stand-ins for what it drives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from equipoise import EpTopology, ExpertLocationMetadata
from equipoise.config import EplbConfig
from equipoise.distributed.in_memory import InMemoryHub
from equipoise.errors import ConfigError, PhaseError, TransferCancelled, TransferError
from equipoise.manager.background_planner import PlanningFailed, RebalancePlanner
from equipoise.manager.commands import Rebalance
from equipoise.manager.failures import FailureWatch
from equipoise.manager.live_placement import LivePlacement
from equipoise.manager.migration import MigrationBroken
from equipoise.manager.phases import Rebalancing
from equipoise.manager.reporting import RebalanceTimer, Reporter
from equipoise.manager.reports import RebalanceReport
from equipoise.transfer.execution.profile import LayerProfile

TOPOLOGY = EpTopology(2, 1, 5)
PERIOD = 3


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Load:
    """Two windows, the older of which has all tokens on expert 0, the newer on expert 7."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int | None]] = []
        self.on_gather: Callable[[], None] = lambda: None

    def local_windows(self, num_windows: int, asked: int | None = None) -> torch.Tensor:
        self.asked.append((num_windows, asked))
        self.on_gather()
        load = torch.ones(2, 2, 8, dtype=torch.int64)
        load[0, :, 0] = load[1, :, 7] = 40
        return load

    def sum_over_ranks(self, counts: torch.Tensor) -> torch.Tensor:
        return counts

    def window_steps(self, asked: int | None) -> int:
        return asked or PERIOD


class Background:
    """Plans when polled, once ``ready``."""

    def __init__(self) -> None:
        self.job: Any = None
        self.ready = True
        self.failure: str | None = None
        self.abandoned = 0

    def abandon(self) -> None:
        self.abandoned += 1

    def start(self, job: Callable[[], Any]) -> None:
        self.job = job

    def poll(self, *, idle: bool) -> Any:
        del idle
        if self.failure is not None:
            raise PlanningFailed(self.failure)
        return self.job() if self.ready else None


class Migration:
    """Arrives after ``steps`` calls, or raises."""

    def __init__(self) -> None:
        self.steps = 1
        self.error: TransferError | None = None
        self.begun: list[Any] = []
        self.layers_pending = self.num_commits = 0
        self.max_staged_experts = 1
        self.peak_staging_bytes = 77
        self.cancelled: str | None = None
        self.profiles = [LayerProfile(0, 0.1, 0.2, 0.3, 4, 5, 4, 0)]
        self.on_advance: Callable[[], None] = lambda: None

    def begin(self, target: Any, plan: Any) -> None:
        self.begun.append((target, plan))
        self.cancelled, self.num_commits = None, 0
        self.layers_pending = self.steps

    def advance(self, *, idle: bool) -> bool:
        del idle
        self.on_advance()
        if self.error is not None:
            raise self.error
        if self.cancelled is not None:
            raise TransferCancelled(self.cancelled)
        self.layers_pending -= 1
        self.num_commits += 1
        return self.layers_pending <= 0

    def cancel(self, reason: str) -> None:
        self.cancelled = reason

    def bytes_over_ranks(self) -> np.ndarray:
        return np.array([[10, 20, 0, 0], [20, 10, 0, 0]])


class Parts:
    def __init__(self, **options: Any) -> None:
        self.clock, self.load, self.background, self.migration = Clock(), Load(), Background(), Migration()
        self.reports: list[RebalanceReport] = []
        config = EplbConfig(
            eplb_algorithm="deepseek", ep_num_redundant_experts=2, eplb_rebalance_num_iterations=PERIOD, **options
        )
        metadata = ExpertLocationMetadata.trivial(2, 8, TOPOLOGY, max_replicas=3)
        placement, timer = LivePlacement(metadata, [3, 4]), RebalanceTimer(self.clock)
        self.failures = FailureWatch(InMemoryHub(1).communicator(0))
        planner = RebalancePlanner(
            config, placement, self.load, self.background, self.failures, timer,  # type: ignore[arg-type]
            dispatch="weights", num_groups=4, max_staged_experts=1, clock=self.clock,
        )  # fmt: skip
        self.reporter = Reporter(placement, self.migration, timer, self.failures, self.reports.append, profile=False)
        self.rebalancing = Rebalancing(config, placement, planner, self.migration, self.failures, self.reporter, timer)
        self.steps = 0

    def step(self, *, counted: bool = True) -> None:
        self.rebalancing.end_step(counted=counted)
        self.steps += 1
        self.tick()

    def tick(self, *, idle: bool = False) -> None:
        self.rebalancing.tick(forward_pass_id=self.steps, idle=idle)

    def steps_until_planning(self) -> int:
        for count in range(1, 10_000):
            self.step()
            if self.rebalancing.phase == "planning":
                return count
        raise AssertionError("no rebalance is ever due")


@pytest.fixture
def parts() -> Parts:
    return Parts()


def test_a_periodic_rebalance_is_due_after_so_many_counted_steps() -> None:
    parts = Parts(enable_eplb=True)
    for _ in range(2 * PERIOD):
        parts.step(counted=False)
    assert parts.rebalancing.phase == "collecting"
    assert parts.steps_until_planning() == PERIOD
    parts.step()
    assert parts.rebalancing.phase == "migrating"
    parts.step()
    assert parts.rebalancing.phase == "collecting"
    assert [report.outcome for report in parts.reports] == ["committed"]
    assert parts.reports[0].forward_pass_id == parts.steps
    assert parts.steps_until_planning() == PERIOD, "steps are counted from the end of the last one"


def test_without_enable_eplb_nothing_is_ever_due(parts: Parts) -> None:
    for _ in range(5 * PERIOD):
        parts.step()
    assert (parts.rebalancing.phase, parts.rebalancing.wants_tick, parts.reports) == ("collecting", False, [])


def test_after_each_failure_the_next_try_waits_twice_as_long_and_after_a_success_no_longer() -> None:
    parts = Parts(enable_eplb=True)
    parts.migration.error = TransferError("a peer left")
    waits = []
    for _ in range(9):
        waits.append(parts.steps_until_planning())
        parts.step()
        parts.step()
    assert waits == [PERIOD * min(2**failures, 64) for failures in range(9)]
    assert {report.outcome for report in parts.reports} == {"failed"}
    assert parts.rebalancing.error == "TransferError: a peer left"
    parts.migration.error = None
    parts.steps_until_planning()
    parts.step()
    parts.step()
    assert (parts.reports[-1].outcome, parts.rebalancing.error) == ("committed", None)
    assert parts.steps_until_planning() == PERIOD
    assert parts.reporter.totals.by_outcome == {
        "failed": 9, "committed": 1, "skipped": 0, "dry_run": 0, "cancelled": 0,
    }  # fmt: skip


def test_ranks_that_cannot_talk_any_more_end_rebalancing_for_good() -> None:
    parts = Parts(enable_eplb=True)
    parts.migration.error = MigrationBroken("rank 1 is gone")
    answers: list[RebalanceReport] = []
    parts.rebalancing.request(Rebalance(), answers.append)
    for _ in range(3):
        parts.step()
    assert parts.rebalancing.phase == "failed"
    assert "rank 1 is gone" in str(answers[0].error)
    assert (answers[0].bytes_moved, answers[0].bytes_sent_per_rank) == (30, [10, 20]), "of what had committed"
    assert parts.reporter.totals.moved_bytes == 30
    assert parts.reporter.totals.moves == 0
    for _ in range(100 * PERIOD):
        parts.step()
    assert len(parts.reports) == 1
    assert not parts.rebalancing.wants_tick
    with pytest.raises(PhaseError, match="rank 1 is gone"):
        parts.rebalancing.request(Rebalance(), answers.append)


def test_a_planner_that_fails_is_reported_and_changes_nothing(parts: Parts) -> None:
    parts.background.failure = "ZeroDivisionError: oh"
    answers: list[RebalanceReport] = []
    parts.rebalancing.request(Rebalance(algorithm="equipoise"), answers.append)
    parts.tick(idle=True)
    parts.tick(idle=True)
    assert (parts.rebalancing.phase, parts.migration.begun) == ("collecting", [])
    assert (answers[0].outcome, answers[0].action, answers[0].algorithm) == ("failed", "skip", "equipoise")
    assert "ZeroDivisionError: oh" in str(answers[0].error)
    assert parts.reports == answers


def test_a_plan_is_made_from_what_was_asked_for(parts: Parts) -> None:
    parts.rebalancing.request(Rebalance(algorithm="deepseek_hierarchical", window_steps=2), parts.reports.append)
    parts.tick()
    assert parts.load.asked == [(8, 2)]
    given = parts.background.job.keywords
    assert given["algorithm"] == "deepseek_hierarchical"
    assert given["window_steps"] == 2
    assert given["num_groups"] == 4
    assert given["max_staged_experts"] == 1
    assert given["request"].window_steps == 2


def test_one_request_at_a_time_and_the_refusal_says_how_far_the_other_is(parts: Parts) -> None:
    parts.migration.steps = 3
    parts.rebalancing.request(Rebalance(), parts.reports.append)
    for phase, said in (
        ("collecting", "begins in the next tick"),
        ("planning", "is being planned"),
        ("migrating", "is migrating, 3 layers to go"),
    ):
        assert parts.rebalancing.phase == phase
        with pytest.raises(PhaseError, match=f"another rebalance {said}"):
            parts.rebalancing.request(Rebalance(), parts.reports.append)
        assert parts.rebalancing.wants_tick
        parts.tick()


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (Rebalance(algorithm="nonsense"), "algorithm"),
        (Rebalance(max_moves_per_layer=-1), "max_moves_per_layer"),
        (Rebalance(window_steps=0), "window_steps"),
    ],
)
def test_a_request_that_cannot_be_is_refused_and_not_kept(parts: Parts, request_: Rebalance, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parts.rebalancing.request(request_, parts.reports.append)
    assert caught.value.field == field
    assert not parts.rebalancing.wants_tick
    parts.rebalancing.request(Rebalance(max_moves_per_layer=0, window_steps=1), parts.reports.append)


def test_a_dry_run_tells_what_it_would_do(parts: Parts) -> None:
    parts.rebalancing.request(Rebalance(dry_run=True), parts.reports.append)
    parts.tick()
    parts.tick()
    (report, _) = parts.reports
    assert (report.outcome, report.action, parts.migration.begun) == ("dry_run", "migrate", [])
    assert sum(report.moves) > 0
    assert report.mean_balancedness_after > report.mean_balancedness_before  # type: ignore[operator]
    assert parts.reporter.totals.moves == 0


def test_the_profile_says_where_the_time_went(parts: Parts) -> None:
    def seconds(amount: float) -> Callable[[], None]:
        def pass_time() -> None:
            parts.clock.now += amount

        return pass_time

    parts.load.on_gather, parts.migration.on_advance, parts.migration.steps = seconds(1.0), seconds(2.0), 2
    parts.background.ready = False
    parts.rebalancing.request(Rebalance(), parts.reports.append)
    parts.tick()  # gathers: 1 s in which a forward pass waits
    seconds(10.0)()
    parts.tick()
    parts.background.ready = True
    seconds(10.0)()
    parts.tick()
    seconds(5.0)()
    parts.tick(idle=True)  # 2 s for which nothing waits
    seconds(5.0)()
    parts.tick()  # 2 s for which a forward pass does
    profile = parts.reports[0].profile
    assert profile.gather_seconds == 1.0
    assert profile.wait_seconds == 21.0
    assert profile.migrate_seconds == 5 + 2 + 5 + 2
    assert profile.stall_seconds == 1.0 + 2.0
    assert (profile.peak_staging_bytes, len(profile.layers)) == (77, 1)
    assert parts.reports[0].stall_seconds == 3.0
    assert parts.reports[0].bytes_sent_per_rank == [10, 20]
    assert parts.reports[0].bytes_received_per_rank == [20, 10]
    parts.rebalancing.request(Rebalance(dry_run=True), parts.reports.append)
    parts.load.on_gather = seconds(0.5)
    parts.tick()
    parts.tick()
    profile = parts.reports[-1].profile
    assert (profile.gather_seconds, profile.wait_seconds, profile.stall_seconds) == (0.5, 0.5, 0.5)
    assert (profile.migrate_seconds, profile.peak_staging_bytes, profile.layers) == (0.0, 0, [])


def paused(parts: Parts, reason: str = "a reload") -> list[str]:
    done: list[str] = []
    parts.rebalancing.pause(reason, lambda: done.append(parts.rebalancing.phase))
    return done


def test_while_paused_nothing_begins_and_afterwards_it_does() -> None:
    parts = Parts(enable_eplb=True)
    assert paused(parts) == ["paused"]
    for _ in range(3 * PERIOD):
        parts.step()
    assert (parts.rebalancing.phase, parts.rebalancing.wants_tick) == ("paused", False)
    assert parts.rebalancing.error == "paused: a reload"
    with pytest.raises(PhaseError, match="paused: a reload"):
        parts.rebalancing.request(Rebalance(), parts.reports.append)
    parts.rebalancing.resume()
    parts.step()
    assert parts.rebalancing.phase == "planning", "it was due long ago"


@pytest.mark.parametrize("ticks", [0, 1])
def test_a_pause_cancels_what_has_not_begun_to_move_at_once(parts: Parts, ticks: int) -> None:
    answers: list[RebalanceReport] = []
    parts.rebalancing.request(Rebalance(), answers.append)
    for _ in range(ticks):
        parts.tick()
    assert paused(parts) == ["paused"]
    assert parts.background.abandoned == ticks
    assert (answers[0].outcome, answers[0].error) == ("cancelled", "paused: a reload")
    assert parts.migration.begun == []
    assert parts.reports == answers
    assert not any(answers[0].moves)


def test_a_pause_waits_for_the_end_of_a_migration_that_it_cancels(parts: Parts) -> None:
    parts.migration.steps = 5
    answers: list[RebalanceReport] = []
    parts.rebalancing.request(Rebalance(), answers.append)
    for _ in range(3):
        parts.tick()
    done = paused(parts)
    assert (done, parts.rebalancing.phase, parts.rebalancing.wants_tick) == ([], "migrating", True)
    parts.tick()
    assert (done, parts.rebalancing.phase) == (["paused"], "paused")
    assert answers[0].outcome == "cancelled"
    parts.rebalancing.resume()
    parts.rebalancing.request(Rebalance(dry_run=True), answers.append)


def test_a_cancelled_rebalance_is_no_reason_to_wait_longer() -> None:
    parts = Parts(enable_eplb=True)
    parts.steps_until_planning()
    paused(parts)
    parts.rebalancing.resume()
    assert parts.steps_until_planning() == PERIOD


def test_reports_name_layers_as_the_host_does_and_a_skip_moves_nothing(parts: Parts) -> None:
    parts.rebalancing.request(Rebalance(max_moves_per_layer=0), parts.reports.append)
    parts.tick()
    parts.tick()
    (report, _) = parts.reports
    assert report.layer_ids == [3, 4]
    assert (report.outcome, report.slots_changed, report.moves) == ("skipped", [0, 0], [0, 0])
    assert report.balancedness_after == report.balancedness_before


def raising(*_: object) -> None:
    raise RuntimeError("a mistake")


def test_an_error_in_a_tick_is_phase_failed_and_never_raised() -> None:
    for place in ("on_gather", "begin"):
        parts = Parts(enable_eplb=True)
        setattr(parts.load if place == "on_gather" else parts.migration, place, raising)
        for _ in range(20):
            parts.step()
        assert parts.rebalancing.phase == "failed", place
        assert "a mistake" in str(parts.rebalancing.error)
        assert not parts.rebalancing.wants_tick
