"""The runners that carry a plan beside the forward passes, on ranks that are threads."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from equipoise.distributed.in_memory import InMemoryHub
from equipoise.errors import InDoubtError, TransferError, TransferTimeout, VerificationError
from equipoise.topology import EpTopology
from equipoise.transfer.execution.runner import InlineRunner, TransferState
from equipoise.transfer.execution.updater import ExpertLocationUpdater
from equipoise.transfer.execution.worker import TransferWorker
from equipoise.transfer.planning.plan import plan_transfer
from helpers.faults import Fault, FaultyCommunicator, FaultyMemory, ScheduledFaults, memory_of
from helpers.lockstep import LockstepCommunicator
from helpers.placements import perturbed, random_map, rank_weights, same_bytes
from helpers.run_threads import results_of

TOPOLOGY = EpTopology(4, 2, 3)


def make_runner(kind, communicator, hub, weights, **options):
    faults = options.pop("faults", None)
    stall = options.pop("stall_timeout", 60.0)
    wire = communicator if kind == "inline" else LockstepCommunicator(hub.communicator(communicator.rank))
    if faults is not None:
        wire = FaultyCommunicator(wire, faults)
        weights = FaultyMemory(memory_of(weights, options.get("verification", "canary")), faults)
    updater = ExpertLocationUpdater(wire, TOPOLOGY, weights, **options)
    return InlineRunner(updater) if kind == "inline" else TransferWorker(updater, stall_timeout=stall)


def drive(runner, communicator, on_commit, polls=10_000):
    """Polls until the plan has ended; returns the number of the poll at which each batch committed."""
    commits = []
    for number in range(polls):
        if not runner.active:
            return commits
        state = runner.poll(communicator)
        if state == TransferState.READY:
            runner.commit(on_commit)
            commits.append(number)
        elif state == TransferState.BROKEN:
            raise RuntimeError(f"broken: {runner.error}")
        time.sleep(0.001)
    raise AssertionError("the plan never ended")


@pytest.mark.parametrize("kind", ["inline", "worker"])
@pytest.mark.parametrize("budget", [None, 1])
def test_a_plan_commits_step_by_step_at_the_same_poll_on_every_rank(kind, budget):
    rng = np.random.default_rng(5)
    placements = [random_map(rng, 9, TOPOLOGY, 3)]
    for _ in range(3):
        placements.append(perturbed(rng, random_map(rng, 9, TOPOLOGY, 3), 9))
    hub = InMemoryHub(4)

    def body(communicator):
        weights = rank_weights(placements[0], communicator.rank, TOPOLOGY)
        runner = make_runner(kind, communicator, hub, weights)
        live, commits = placements[0].copy(), []
        try:
            for new in placements[1:]:
                plan = plan_transfer(live, new, TOPOLOGY, num_logical_experts=9, max_staged_experts=budget)

                def apply(layer_id, batch):
                    # The weights in the slots and the map must agree after every single commit.
                    live[layer_id] = batch.new_map
                    expected = rank_weights(live, communicator.rank, TOPOLOGY)[layer_id]
                    assert all(same_bytes(a, b) for a, b in zip(weights[layer_id], expected, strict=True))

                runner.start(plan)
                commits.append(drive(runner, communicator, apply))
                assert (live == new).all()
                assert len(commits[-1]) == sum(len(layer.batches) for layer in plan.layers)
        finally:
            runner.close()
        return commits

    results = results_of(body, 4)
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("kind", ["inline", "worker"])
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault("corrupt", 1, "transfer"), VerificationError),
        (Fault("corrupt", 2, "verify", layer=1), VerificationError),
        (Fault("drop", 0, "verify"), VerificationError),
        (Fault("raise", 3, "transfer"), TransferTimeout),
        (Fault("raise", 3, "verify", layer=1), TransferError),
        (Fault("drop", 2, "transfer", layer=1), TransferTimeout),
    ],
    ids=lambda value: f"{value.kind}-{value.phase}" if isinstance(value, Fault) else None,
)
def test_a_fault_reaches_every_rank_at_the_same_poll_and_the_next_plan_succeeds(kind, fault, error):
    old = np.tile(np.arange(12), (2, 1))
    new = np.roll(old, 4, axis=1)
    hub = InMemoryHub(4)

    def body(communicator):
        weights = rank_weights(old, communicator.rank, TOPOLOGY)
        faults = ScheduledFaults([fault], communicator.rank)
        options = {"verification": "checksum", "timeout": 0.4, "faults": faults}
        runner = make_runner(kind, communicator, hub, weights, **options)
        live = old.copy()

        def apply(layer_id, batch):
            live[layer_id] = batch.new_map

        try:
            runner.start(plan_transfer(live, new, TOPOLOGY))
            with pytest.raises(error, match=r"layer \d was not migrated") as caught:
                drive(runner, communicator, apply)
            assert faults.num_left == 0
            expected = rank_weights(live, communicator.rank, TOPOLOGY)
            for layer in range(2):
                assert all(same_bytes(a, b) for a, b in zip(weights[layer], expected[layer], strict=True))
            failed_at = live.copy()
            runner.start(plan_transfer(live, new, TOPOLOGY))
            drive(runner, communicator, apply)
            assert (live == new).all()
            expected = rank_weights(new, communicator.rank, TOPOLOGY)
            for layer in range(2):
                assert all(same_bytes(a, b) for a, b in zip(weights[layer], expected[layer], strict=True))
        finally:
            runner.close()
        return type(caught.value).__name__, failed_at.tolist()

    results = results_of(body, 4)
    assert all(result == results[0] for result in results)


def test_a_worker_that_hangs_is_reported_on_every_rank():
    old = np.arange(12)[None]
    hub = InMemoryHub(4)
    release = threading.Event()

    def body(communicator):
        weights = rank_weights(old, communicator.rank, TOPOLOGY)
        faults = ScheduledFaults(
            [Fault("delay", 1, "verify", seconds=30.0)], communicator.rank, sleep=lambda _: release.wait(30.0)
        )
        runner = make_runner("worker", communicator, hub, weights, faults=faults, stall_timeout=0.3)
        runner.start(plan_transfer(old, np.roll(old, 3, axis=1), TOPOLOGY))
        with pytest.raises(RuntimeError, match="broken"):
            drive(runner, communicator, lambda *_: None)
        error = runner.error
        communicator.barrier()
        release.set()
        runner.close()
        return error, runner.active

    results = results_of(body, 4)
    assert any("no progress" in (error or "") for error, _ in results)
    assert not any(active for _, active in results)


@pytest.mark.parametrize("after_the_vote", [False, True])
def test_a_worker_that_dies_of_a_bug_is_reported_on_every_rank_and_replaced(monkeypatch, after_the_vote):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    old = np.tile(np.arange(12), (3, 1))
    hub = InMemoryHub(4)

    def body(communicator):
        weights = rank_weights(old, communicator.rank, TOPOLOGY)
        own = hub.communicator(communicator.rank)
        updater = ExpertLocationUpdater(own, TOPOLOGY, weights, timeout=0.3, vote_grace=0.3)
        stage = updater.stage
        if communicator.rank == 2:
            updater.stage = lambda *batch: (stage(*batch) if after_the_vote else None, 1 / 0)
        runner = TransferWorker(updater)
        new = np.roll(old, 3, axis=1)
        runner.start(plan_transfer(old, new, TOPOLOGY))
        with pytest.raises(TransferError, match="nobody committed.*rank 2: ZeroDivisionError") as caught:
            drive(runner, communicator, lambda *_: None)
        assert not runner.active
        updater.stage = stage
        runner.start(plan_transfer(old, new, TOPOLOGY))
        drive(runner, communicator, lambda *_: None)
        expected = rank_weights(new, communicator.rank, TOPOLOGY)
        for tensors, right in zip(weights, expected, strict=True):
            assert all(same_bytes(a, b) for a, b in zip(tensors, right, strict=True))
        runner.close()
        return str(caught.value)

    told = results_of(body, 4)
    assert told == [told[0]] * 4


@pytest.mark.parametrize("kind", ["inline", "worker"])
def test_a_rank_in_doubt_keeps_those_that_are_not_from_committing(kind):
    """Rank 2 does not hear how the vote ended; the others know that all ranks could commit."""
    old = np.tile(np.arange(12), (3, 1))
    new = np.roll(old, 3, axis=1)
    hub = InMemoryHub(4)

    def body(communicator):
        weights = rank_weights(old, communicator.rank, TOPOLOGY)
        own = hub.communicator(communicator.rank)
        updater = ExpertLocationUpdater(own, TOPOLOGY, weights, timeout=1.0, vote_grace=1.0)
        stage, commits = updater.stage, []

        def stage_and_lose_the_answer(*batch):
            stage(*batch)
            raise InDoubtError("the vote broke off")

        if communicator.rank == 2:
            updater.stage = stage_and_lose_the_answer
        runner = InlineRunner(updater) if kind == "inline" else TransferWorker(updater)
        runner.start(plan_transfer(old, new, TOPOLOGY))
        with pytest.raises(TransferError, match="nobody committed.*rank 2: .*the vote broke off") as caught:
            drive(runner, communicator, lambda *_: commits.append(1))
        assert not commits
        expected = rank_weights(old, communicator.rank, TOPOLOGY)
        for tensors, right in zip(weights, expected, strict=True):
            assert all(same_bytes(a, b) for a, b in zip(tensors, right, strict=True))
        updater.stage = stage
        runner.start(plan_transfer(old, new, TOPOLOGY))
        drive(runner, communicator, lambda *_: commits.append(1))
        runner.close()
        return str(caught.value), len(commits)

    results = results_of(body, 4)
    assert results == [(results[0][0], 3)] * 4


def test_commit_waits_for_no_one():
    """The forward pass pays the commit only: polls answer at once while a slow transfer runs."""
    old = np.arange(12)[None]
    hub = InMemoryHub(4)

    def body(communicator):
        weights = rank_weights(old, communicator.rank, TOPOLOGY)
        faults = ScheduledFaults([Fault("delay", 0, "transfer", seconds=0.5)], communicator.rank)
        runner = make_runner("worker", communicator, hub, weights, faults=faults)
        runner.start(plan_transfer(old, np.roll(old, 3, axis=1), TOPOLOGY))
        working = 0
        while runner.active:
            state = runner.poll(communicator)
            working += state == TransferState.WORKING
            if state == TransferState.READY:
                runner.commit(lambda *_: None)
            time.sleep(0.005)
        runner.close()
        return working

    assert min(results_of(body, 4)) > 10


def test_ranks_say_little_while_there_is_nothing_to_say():
    """Of the polls of every batch but the first, the first half sends no message; all ranks leave out the same ones."""
    old = np.stack([np.arange(12)] * 4)
    hub = InMemoryHub(4)

    def body(communicator):
        weights = rank_weights(old, communicator.rank, TOPOLOGY)
        faults = ScheduledFaults(
            [Fault("delay", layer, "transfer", seconds=0.3) for layer in range(4)], communicator.rank
        )
        runner = make_runner("worker", communicator, hub, weights, faults=faults)
        posted, post_sum = [], communicator.post_sum
        communicator.post_sum = lambda tensor: posted.append(number) or post_sum(tensor)
        runner.start(plan_transfer(old, np.roll(old, 3, axis=1), TOPOLOGY))
        number, commits = 0, [-1]
        while runner.active:
            number += 1
            if runner.poll(communicator) == TransferState.READY:
                runner.commit(lambda *_: None)
                commits.append(number)
            time.sleep(0.005)
        runner.close()
        return posted, commits

    results = results_of(body, 4)
    assert all(result == results[0] for result in results)
    posted, (start, *ends) = results[0]
    assert len(ends) == 4
    for before, first, last in zip([start, *ends], ends, ends[1:], strict=False):
        silence = [number for number in range(first + 1, last) if number not in posted]
        assert len(silence) >= (first - before) // 2 - 1
        assert silence[:2] == [first + 1, first + 2]
