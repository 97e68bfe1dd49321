"""The phase machine by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from equipoise.errors import ConfigError, PhaseError, TransferError
from equipoise.manager.commands import Rebalance
from equipoise.manager.migration import MigrationBroken
from equipoise.manager.reports import RebalanceReport
from helpers.phase_parts import PERIOD, Parts


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
