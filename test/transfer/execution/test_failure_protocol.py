"""The failure protocol: one test for each row of the table in transfer/execution/__init__.py, named like the row.

Ranks are threads, each with a transfer thread; rank_dies needs processes and is in test_faults_ranks.py.
"""

from __future__ import annotations

import re
import threading
import time

import numpy as np
import pytest
import torch

import equipoise.transfer.execution as execution
from equipoise.distributed.in_memory import InMemoryHub
from equipoise.errors import InDoubtError, PlanMismatchError, TransferError, TransferTimeout, VerificationError
from equipoise.topology import EpTopology
from equipoise.transfer.execution.runner import TransferState
from equipoise.transfer.execution.updater import ExpertLocationUpdater
from equipoise.transfer.execution.worker import TransferWorker, silent_polls
from equipoise.transfer.planning.plan import plan_transfer
from helpers.faults import Fault, FaultyCommunicator, FaultyMemory, InjectedFault, ScheduledFaults, memory_of
from helpers.lockstep import LockstepCommunicator
from helpers.placements import rank_weights, same_bytes
from helpers.run_threads import results_of

TOPOLOGY = EpTopology(3, 1, 2)
OLD = np.arange(6)[None]
NEW = np.roll(OLD, 2, axis=1)


class Rank:
    """A rank with a worker. ``run`` drives a plan to its end and checks that weights and map agree."""

    def __init__(self, communicator, hub, faults, **options):
        self.communicator, self.rank = communicator, communicator.rank
        self.map = OLD.copy()
        self.weights = rank_weights(OLD, self.rank, TOPOLOGY)
        self.faults = ScheduledFaults(faults, self.rank)
        stall_timeout = options.pop("stall_timeout", 30.0)
        wire = FaultyCommunicator(LockstepCommunicator(hub.communicator(self.rank)), self.faults)
        self.wire = wire
        memory = FaultyMemory(memory_of(self.weights, "checksum"), self.faults)
        options = {"timeout": 0.4, "vote_grace": 0.4, **options}
        self.updater = ExpertLocationUpdater(wire, TOPOLOGY, memory, verification="checksum", **options)
        self.runner = TransferWorker(self.updater, stall_timeout=stall_timeout)
        self.commits = 0

    def run(self, target=NEW):
        """The state or the error in which a plan ends: READY if it committed."""
        self.runner.start(plan_transfer(self.map, target, TOPOLOGY, num_logical_experts=6))
        try:
            while self.runner.active:
                state = self.runner.poll(self.communicator)
                if state == TransferState.BROKEN:
                    return state
                if state == TransferState.READY:
                    self.runner.commit(self.apply)
                time.sleep(0.001)
        except TransferError as error:
            return error
        finally:
            expected = rank_weights(self.map, self.rank, TOPOLOGY)
            assert all(same_bytes(a, b) for a, b in zip(self.weights[0], expected[0], strict=True))
        return TransferState.READY

    def apply(self, layer_id, batch):
        self.map[layer_id] = batch.new_map
        self.commits += 1


def outcomes_of(*faults, then=True, prepare=None, **options):
    """What a first plan ends in on each rank, all of them alike; a second one then succeeds if ``then``."""
    hub = InMemoryHub(3)

    def body(communicator):
        rank = Rank(communicator, hub, faults, **options)
        if prepare is not None:
            prepare(rank)
        outcome = rank.run()
        assert rank.commits == 0
        assert rank.faults.num_left == 0
        if then:
            assert rank.updater.error is None
            assert rank.run() == TransferState.READY
        rank.runner.close()
        return (outcome,)  # in a tuple: an exception by itself would be taken for one that was raised

    outcomes = [outcome for (outcome,) in results_of(body, 3)]
    assert len({str(outcome) for outcome in outcomes}) == 1, outcomes
    assert len({type(outcome) for outcome in outcomes}) == 1, outcomes
    return outcomes


def test_every_row_of_the_table_has_its_test():
    rows = re.findall(r"^([a-z_]+)  +", execution.__doc__.split("==\n", 2)[-1], re.MULTILINE)
    rows = [row for row in rows if row != "event"]
    assert len(rows) == 12
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert set(rows) - tests == {"rank_dies"}


def test_plans_differ():
    hub = InMemoryHub(3)

    def body(communicator):
        rank = Rank(communicator, hub, ())
        return (rank.run(NEW if communicator.rank else np.roll(OLD, 4, axis=1)),)

    for (outcome,) in results_of(body, 3):
        assert isinstance(outcome, PlanMismatchError)


def test_message_lost():
    outcomes = outcomes_of(Fault("drop", 1, "transfer"))
    assert all(isinstance(outcome, TransferTimeout) for outcome in outcomes)


def test_message_late():
    outcomes = outcomes_of(Fault("delay", 1, "transfer", seconds=0.6))
    assert all(isinstance(outcome, TransferTimeout) for outcome in outcomes)


@pytest.mark.parametrize("phase", ["transfer", "verify"])
def test_bytes_damaged(phase):
    rebuilt = []

    def watch(rank):
        rebuild = rank.wire.rebuild
        rank.wire.rebuild = lambda **given: (rebuilt.append(given), rebuild(**given))

    outcomes = outcomes_of(Fault("corrupt", 1, phase), prepare=watch)
    assert all(isinstance(outcome, VerificationError) for outcome in outcomes)
    assert not rebuilt, "all messages have arrived: groups stay"


@pytest.mark.parametrize(("phase", "kind"), [("transfer", TransferTimeout), ("verify", TransferError)])
def test_staging_raises(phase, kind):
    for outcome in outcomes_of(Fault("raise", 1, phase)):
        assert type(outcome) is kind
        assert "rank 1: InjectedFault" in str(outcome)


def test_vote_not_cast():
    for outcome in outcomes_of(Fault("drop", 1, "vote")):
        assert re.search("nobody committed.*rank 1: .*the vote was not cast", str(outcome))


def test_vote_answer_lost():
    def lose_the_answer(rank):
        stage = rank.updater.stage

        def once(*batch):
            rank.updater.stage = stage
            stage(*batch)
            raise InDoubtError("the vote broke off")

        if rank.rank == 2:
            rank.updater.stage = once

    for outcome in outcomes_of(prepare=lose_the_answer):
        assert re.search("nobody committed: rank 2: .*the vote broke off", str(outcome))


def test_thread_ends(monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    def break_it(rank):
        stage = rank.updater.stage

        def once(*_batch):
            rank.updater.stage = stage
            return 1 / 0

        if rank.rank == 0:
            rank.updater.stage = once

    for outcome in outcomes_of(prepare=break_it):
        assert re.search("nobody committed: .*rank 0: ZeroDivisionError", str(outcome))


def test_thread_hangs():
    outcomes = outcomes_of(
        Fault("delay", 1, "verify", seconds=3.0), then=False, stall_timeout=0.5, timeout=9.0, vote_grace=9.0
    )
    assert outcomes == [TransferState.BROKEN] * 3


def test_no_new_groups():
    def refuse(rank):
        def rebuild(**_):
            raise TransferError("no way to make a new one")

        rank.wire.rebuild = rebuild

    hub = InMemoryHub(3)

    def body(communicator):
        rank = Rank(communicator, hub, [Fault("drop", 1, "transfer")])
        refuse(rank)
        outcome = rank.run()
        return type(outcome), rank.runner.error, rank.map.tolist()

    for kind, error, live in results_of(body, 3):
        assert (kind, live) == (TransferTimeout, OLD.tolist())
        assert error.startswith("no way to make a new one (after: ")


def test_commit_raises():
    hub = InMemoryHub(3)

    def body(communicator):
        rank = Rank(communicator, hub, [Fault("raise", 1, "commit")])
        try:
            return rank.run(), rank.commits
        except InjectedFault as error:
            return error, rank.commits

    results = results_of(body, 3)
    assert [commits for _, commits in results] == [1, 0, 1], "the others have committed"
    assert isinstance(results[1][0], InjectedFault)


def test_states_travel_as_numbers():
    """They are the wire format of a poll, so a change of order is a change of protocol."""
    assert [(state.name, state.value) for state in TransferState] == [
        ("IDLE", 0), ("WORKING", 1), ("READY", 2), ("IN_DOUBT", 3), ("BROKEN", 4), ("FAILED", 5)
    ]  # fmt: skip


def test_half_of_the_polls_are_silent():
    assert [silent_polls(polls) for polls in (0, 1, 2, 7)] == [0, 0, 1, 3]


def test_all_ranks_vote_yes_with_nothing_to_send():
    """A batch in which a rank only copies inside itself still needs its vote."""
    hub = InMemoryHub(3)
    target = OLD.copy()
    target[0, :2] = [1, 0]

    def body(communicator):
        rank = Rank(communicator, hub, ())
        assert rank.run(target) == TransferState.READY
        assert torch.equal(torch.as_tensor(rank.map), torch.as_tensor(target))
        rank.runner.close()

    results_of(body, 3)
