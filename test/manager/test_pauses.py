"""The phase machine while a host or an operator pauses it."""

from __future__ import annotations

import pytest

from equipoise.errors import PhaseError
from equipoise.manager.commands import Rebalance
from equipoise.manager.reports import RebalanceReport
from helpers.phase_parts import PERIOD, Parts


@pytest.fixture
def parts() -> Parts:
    return Parts()


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
