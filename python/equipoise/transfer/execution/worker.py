"""Runs transfer plans in a thread of its own, beside the forward passes; see transfer_runner.py for the interface."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Literal, get_args

from equipoise.distributed.communicator import Communicator
from equipoise.distributed.posted_sum import SumBetweenPolls
from equipoise.errors import EquipoiseError, InDoubtError, TransferError
from equipoise.transfer.execution.profile import LayerTransferReport
from equipoise.transfer.execution.runner import OnCommit, PollResult, batches_of, start_over
from equipoise.transfer.execution.updater import ExpertLocationUpdater, StagedBatch
from equipoise.transfer.planning.types import TransferBatch, TransferPlan

WorkerState = Literal["working", "ready", "failed", "hung"]


class TransferWorker:
    """Stages in a thread of its own, one batch ahead of the commits.

    The ranks' states travel while the forward pass runs: a poll reads what all of them said in the poll before it. So
    the serving thread waits for no other rank, and a batch is committed one forward pass later. Even a message that
    nobody waits for takes time from forward passes: the ranks are silent for half as long as the batch before took.

    Args:
        updater: with groups that nobody else uses: two threads must not mix their messages on one group.
        stall_timeout: seconds without progress after which the watchdog in :meth:`poll` calls the thread hung; more
            than the updater's timeout and vote grace together.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        updater: ExpertLocationUpdater,
        *,
        stall_timeout: float = 120.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._updater = updater
        self._stall_timeout = stall_timeout
        self._clock = clock
        self._condition = threading.Condition()
        self._plan: TransferPlan | None = None  # set by start, taken by the thread
        self._active = False
        self._outcome: StagedBatch | TransferError | None = None  # set by the thread, cleared by commit
        self._failure: str | None = None
        self._hung = False
        self._last_batch: TransferBatch | None = None  # of the plan under way
        self._num_started_over = 0  # a thread that sees this change abandons its plan
        self._closed = False
        self._last_progress = clock()
        self._states = SumBetweenPolls()  # ranks in each WorkerState
        self._polls = 0  # for the batch under way; the same on all ranks
        self._silent_polls = 0  # of those, that say nothing
        self._thread = self._new_thread()

    @property
    def active(self) -> bool:
        return self._active

    @property
    def error(self) -> str | None:
        return self._failure or self._updater.broken

    def start(self, plan: TransferPlan) -> None:
        with self._condition:
            assert not self._active
            if not plan.layers:
                return
            self._plan, self._active = plan, True
            self._polls = self._silent_polls = 0
            self._last_batch = plan.layers[-1].batches[-1]
            self._last_progress = self._clock()
            self._condition.notify_all()

    def poll(self, communicator: Communicator) -> PollResult:
        if not self._active:
            return "broken" if self._hung else "idle"
        self._polls += 1
        if self._polls <= self._silent_polls:
            return "working"
        counts = self._states.take()
        result: PollResult = "working" if counts is None else self._read(counts, communicator)
        if result == "working":
            mine = self._state()
            self._states.post(communicator, [int(state == mine) for state in get_args(WorkerState)])
        return result

    def commit(self, on_commit: OnCommit) -> LayerTransferReport:
        with self._condition:
            outcome = self._outcome
        assert outcome is not None
        if isinstance(outcome, TransferError):
            with self._condition:
                self._outcome, self._active = None, False
                self._failure = self._updater.broken
                self._condition.notify_all()
            raise outcome
        report = self._updater.commit(outcome)
        on_commit(outcome.layer_id, outcome.batch)
        self._polls, self._silent_polls = 0, self._polls // 2
        with self._condition:
            self._outcome = None
            self._last_progress = self._clock()
            self._active = outcome.batch is not self._last_batch
            self._condition.notify_all()
        return report

    def close(self) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        self._thread.join(timeout=1.0)

    # On the serving thread ------------------------------------------------------------------------------------------

    def _state(self) -> WorkerState:
        with self._condition:
            if self._outcome is not None:
                return "ready"
            if self._failure is None and not self._thread.is_alive() and not self._closed:
                self._failure = "the transfer thread has died"
            stalled = self._clock() - self._last_progress
            if self._failure is None and stalled > self._stall_timeout:
                self._failure, self._hung = f"the transfer thread has made no progress for {stalled:.1f} s", True
            if self._failure is None:
                return "working"
            return "hung" if self._hung else "failed"

    def _read(self, counts: list[int], communicator: Communicator) -> PollResult:
        """``counts``: ranks in each state."""
        working, ready, failed, hung = counts
        if hung:  # its thread may still write to what it staged: there is no way back
            self._active, self._hung = False, True
            return "broken"
        if ready == communicator.world_size:
            return "ready"
        if working or not failed:  # a rank that is still inside the transfer finds out by its own timeout
            return "working"
        with self._condition:
            failure, self._failure = self._failure, None
            self._num_started_over += 1
        error = start_over(self._updater, failure, communicator)
        if failure is not None:
            self._thread.join()  # it has said why it ends
            self._thread = self._new_thread()
        with self._condition:
            self._outcome = error
            self._condition.notify_all()
        return "ready"

    # On the thread --------------------------------------------------------------------------------------------------

    def _new_thread(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name="eplb-transfer", daemon=True)
        thread.start()
        return thread

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._plan is not None or self._closed)
                if self._closed:
                    return
                plan, self._plan = self._plan, None
                number = self._num_started_over
            assert plan is not None
            try:
                self._run_plan(plan, number)
            except BaseException as error:  # whatever it is, the watchdog must be able to say it
                with self._condition:
                    self._failure = f"{type(error).__name__}: {error}"
                if not isinstance(error, EquipoiseError):
                    raise
                return

    def _run_plan(self, plan: TransferPlan, number: int) -> None:
        """Raises what cannot be voted on: InDoubtError and bugs."""
        try:
            self._updater.agree_on(plan)
            for layer_id, batch in batches_of(plan):
                if not self._hand_over(self._updater.stage(layer_id, batch), number):
                    return
        except InDoubtError:
            raise
        except TransferError as error:
            self._hand_over(error, number)

    def _hand_over(self, outcome: StagedBatch | TransferError, number: int) -> bool:
        """Waits until the serving thread has committed; False: the plan is abandoned, or the runner closed."""
        with self._condition:
            self._outcome = outcome
            self._last_progress = self._clock()
            self._condition.wait_for(lambda: self._outcome is not outcome or self._closed)
            return not self._closed and number == self._num_started_over
