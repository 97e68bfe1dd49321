"""What rank 0 remembers of its steps: the last ones, and sums that lose none."""

from __future__ import annotations

from equipoise.engine.step_log import StepLog, StepRecord


def test_sums_hold_steps_that_are_forgotten() -> None:
    log = StepLog(kept=3)
    seconds = [0.0005, 0.001, 0.0011, 7.0, 0.003]
    for number, each in enumerate(seconds):
        log.note(StepRecord(number, each, 10 * number, "migrating" if number == 1 else "collecting"))
    assert [step.forward_pass_id for step in log.since(0)] == [2, 3, 4]
    assert [step.forward_pass_id for step in log.since(4)] == [4]
    collecting, migrating = log.totals()
    assert (collecting.phase, collecting.num_steps, collecting.num_tokens) == ("collecting", 4, 0 + 20 + 30 + 40)
    assert collecting.seconds == sum(seconds) - 0.001
    assert (migrating.phase, migrating.num_steps, migrating.num_tokens) == ("migrating", 1, 10)
    counted = {bound: count for bound, count in collecting.durations.items() if count}
    assert counted == {0.001: 1, 0.002: 1, 0.005: 1, float("inf"): 1}
    assert {bound: count for bound, count in migrating.durations.items() if count} == {0.001: 1}, "bounds are inclusive"


def test_totals_told_are_not_changed_by_later_steps() -> None:
    log = StepLog()
    assert log.totals() == []
    log.note(StepRecord(0, 0.1, 4, "collecting"))
    (told,) = log.totals()
    log.note(StepRecord(1, 0.1, 4, "collecting"))
    assert (told.num_steps, told.num_tokens) == (1, 4)
