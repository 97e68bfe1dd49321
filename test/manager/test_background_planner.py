"""Planning beside the serving threads of ranks that are threads themselves."""

from __future__ import annotations

import threading
import time

import pytest

from equipoise.distributed.in_memory import InMemoryCommunicator
from equipoise.manager.background_planner import BackgroundPlanner, PlanningFailed
from helpers.run_threads import results_of

POLLS = 20_000


def first_result(planner: BackgroundPlanner[int]) -> int:
    return next(result for result in (planner.poll(idle=True) for _ in range(POLLS)) if result is not None)


def test_all_ranks_learn_the_result_of_rank_0_in_the_same_poll() -> None:
    release = threading.Event()
    ran: list[int] = []

    def body(communicator: InMemoryCommunicator) -> tuple[int, list[int]]:
        planner: BackgroundPlanner[list[int]] = BackgroundPlanner(communicator)
        rank = communicator.rank

        def job() -> list[int]:
            assert release.wait(20)
            ran.append(rank)
            return [rank, 5]

        try:
            planner.start(job)
            for number in range(POLLS):
                result = planner.poll(idle=True)
                if result is not None:
                    assert planner.poll(idle=False) is None, "told once"
                    return number, result
                if number == 3 and rank == 1:
                    release.set()
        finally:
            planner.close()
        raise AssertionError("no result")

    results = results_of(body, 3)
    assert ran == [0]
    assert {result[0] for result in results} == {results[0][0]}
    assert results[0][0] > 3
    assert [result[1] for result in results] == [[0, 5]] * 3


def test_a_job_that_raises_is_told_on_every_rank_and_the_next_one_runs() -> None:
    def body(communicator: InMemoryCommunicator) -> int:
        planner: BackgroundPlanner[int] = BackgroundPlanner(communicator)
        try:
            planner.start(lambda: 1 // 0)
            with pytest.raises(PlanningFailed, match="ZeroDivisionError: integer"):
                first_result(planner)
            planner.start(lambda: 7)
            return first_result(planner)
        finally:
            planner.close()

    assert results_of(body, 2) == [7, 7]


def test_a_plan_waits_behind_what_was_to_be_prepared_and_a_poll_does_not() -> None:
    release, done = threading.Event(), []

    def body(communicator: InMemoryCommunicator) -> list[str]:
        planner: BackgroundPlanner[str] = BackgroundPlanner(communicator)

        def prepare() -> None:
            release.wait(20)
            done.append(f"prepared {communicator.rank}")

        try:
            planner.prepare(prepare)
            planner.start(lambda: "planned after " + ", ".join(done))
            began = time.monotonic()
            assert planner.poll(idle=False) is None
            assert time.monotonic() - began < 5
            communicator.barrier()
            release.set()
            return [result for result in (planner.poll(idle=True) for _ in range(2000)) if result is not None]
        finally:
            planner.close()

    assert results_of(body, 2) == [["planned after prepared 0"]] * 2
