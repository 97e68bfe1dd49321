"""The balancer on ranks that are threads, driven as SGLang's hooks drive it: counts, passes, turns, commands, holds."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from equipoise.errors import PhaseError
from equipoise.manager.commands import GetStatus, Pause, Rebalance
from helpers.sglang_scheduler import LAYER_IDS, NUM_SLOTS, Scheduler, on_ranks


def test_rebalance_between_passes_moves_weights_and_maps_together() -> None:
    def body(scheduler: Scheduler) -> Any:
        for _ in range(5):
            scheduler.forward()
        report = scheduler.ask(Rebalance(), carry_on=scheduler.forward)
        scheduler.check_weights_follow_maps()
        return report.outcome, sum(report.moves), report.layer_ids

    for outcome, moves, layer_ids in on_ranks(body):
        assert (outcome, layer_ids) == ("committed", LAYER_IDS)
        assert moves > 0


def test_rebalance_on_an_idle_server_goes_on_in_turns() -> None:
    def body(scheduler: Scheduler) -> Any:
        scheduler.forward()
        assert not scheduler.balancer.wants_tick
        report = scheduler.ask(Rebalance())
        scheduler.idle(turns=3)
        scheduler.check_weights_follow_maps()
        return report.outcome, scheduler.balancer.idle_ticks > 0, scheduler.balancer.wants_tick

    assert on_ranks(body) == [("committed", True, False)] * 2


def test_turn_ticks_only_where_no_pass_has() -> None:
    def body(scheduler: Scheduler) -> tuple[bool, int]:
        for _ in range(7):
            scheduler.forward()
        scheduler.ask(Rebalance(dry_run=True), carry_on=scheduler.forward)  # wants ticks, and gets them after passes
        return scheduler.balancer.ticks >= 7, scheduler.balancer.idle_ticks

    assert on_ranks(body) == [(True, 0)] * 2


def test_replicated_counts_are_not_summed_over_ranks() -> None:
    def body(scheduler: Scheduler) -> Any:
        scheduler.forward()
        return scheduler.ask(GetStatus())

    status = on_ranks(body)[0]
    assert sum(status.rank_load[0]) == 10 * NUM_SLOTS


def test_hold_cancels_what_moves_and_release_goes_on() -> None:
    def body(scheduler: Scheduler) -> Any:
        scheduler.forward()
        replies: list[Any] = []
        scheduler.balancer.submit(Rebalance(), replies.append)
        scheduler.balancer.hold("weights")
        refused = scheduler.ask(Rebalance())
        scheduler.balancer.release("weights")
        scheduler.check_weights_follow_maps()
        return replies[0].outcome, type(refused), scheduler.ask(Rebalance()).outcome

    assert on_ranks(body) == [("cancelled", PhaseError, "committed")] * 2


def test_weights_loaded_anew_in_the_middle_of_a_migration_are_what_serves_on() -> None:
    def body(scheduler: Scheduler) -> list[str]:
        scheduler.forward()
        replies: list[Any] = []
        scheduler.balancer.submit(Rebalance(), replies.append)
        while scheduler.balancer.manager.phase != "migrating":
            scheduler.idle()
        scheduler.balancer.hold("reload")
        scheduler.load_weights(added=1.5)
        scheduler.balancer.release("reload")
        scheduler.check_weights_follow_maps()
        outcome = scheduler.ask(Rebalance()).outcome
        scheduler.check_weights_follow_maps()
        return [replies[0].outcome, outcome]

    assert on_ranks(body, eplb_verification="checksum") == [["cancelled", "committed"]] * 2


def test_two_holds_end_with_the_last_and_an_operators_pause_outlives_them() -> None:
    def body(scheduler: Scheduler) -> list[str]:
        phases = []
        scheduler.balancer.hold("session")
        scheduler.balancer.hold("reload")
        scheduler.balancer.release("reload")
        phases.append(scheduler.balancer.manager.phase)
        scheduler.balancer.release("session")
        phases.append(scheduler.balancer.manager.phase)
        scheduler.ask(Pause("a test"))
        scheduler.balancer.hold("reload")
        scheduler.balancer.release("reload")
        return [*phases, scheduler.balancer.manager.phase]

    assert on_ranks(body) == [["paused", "collecting", "paused"]] * 2


def test_rank_that_fails_leaves_all_ranks_with_the_same_dispatch() -> None:
    """Without an a2a backend ranks that choose different replicas for a token answer wrongly."""

    def body(scheduler: Scheduler) -> tuple[str, torch.Tensor]:
        def fail(*_: object) -> None:
            raise RuntimeError("injected by a test")

        for _ in range(3):
            scheduler.forward()
        assert scheduler.ask(Rebalance(), carry_on=scheduler.forward).outcome == "committed"
        scheduler.idle(turns=5)
        if scheduler.rank == 1:
            scheduler.balancer.manager._migration.begin = fail  # type: ignore[method-assign]
        for _ in range(5):
            scheduler.forward()
        scheduler.balancer.submit(Rebalance(algorithm="deepseek", force=True), lambda _reply: None)
        while scheduler.balancer.manager.wants_tick:  # a plan may have to wait for the compiler
            scheduler.forward()
        return scheduler.balancer.manager.phase, scheduler.maps.logical_to_all_physical_map

    (phase, tables), (other_phase, other_tables) = on_ranks(body)
    assert (phase, other_phase) == ("failed", "failed")
    assert torch.equal(tables, other_tables)


@pytest.mark.parametrize("where", ["record_counts", "recorder.end_step", "weights_changed", "on_phase", "on_reply"])
def test_error_between_ticks_on_one_rank_stops_all_in_the_same_pass(where: str) -> None:
    """None waits for a message of the rank that failed, and none commits a pass apart."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("injected by a test")

    def body(scheduler: Scheduler) -> tuple[str, int, str]:
        balancer, manager = scheduler.balancer, scheduler.balancer.manager
        for _ in range(3):
            scheduler.forward()
        if scheduler.rank == 1:
            match where:
                case "on_phase":
                    balancer._on_phase = fail
                case "on_reply":
                    balancer.submit(GetStatus(), fail)
                case _:
                    owner, _, name = where.rpartition(".")
                    setattr(getattr(manager, owner) if owner else manager, name, fail)
        elif where == "on_reply":
            balancer.submit(GetStatus(), lambda _reply: None)
        balancer.hold("weights")
        balancer.release("weights")
        passes, began = 0, time.monotonic()
        while manager.phase != "failed":
            scheduler.forward()
            passes += 1
            assert time.monotonic() - began < 20, "a rank was waited for"
        return manager.phase, passes, str(scheduler.ask(GetStatus()).error)

    results = on_ranks(body, enable_eplb=True, eplb_rebalance_num_iterations=10)
    assert {(phase, passes) for phase, passes, _ in results} == {("failed", results[0][1])}
    assert all("rank 1: " in error and "injected by a test" in error for *_, error in results)
