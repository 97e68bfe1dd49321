"""Runs transfer plans in a thread of its own, overlapped with the forward passes; runner.py has the interface.

Two threads, and who may touch what::

    serving thread                          _condition guards                    transfer thread
    ------------------------------------    ---------------------------------    ------------------------------
    start  sets _plan              ───────> _plan                       ───────> takes it, clears it
                                            _outcome            <───────         a staged batch, or its error
    commit takes _outcome, clears  ───────> _outcome is None
    proceed or poll, wakes         ───────>                             ───────> stages the next batch
    poll   reads                   <─────── _failure            <───────         why it ended, if it did
    after start_over or cancel, adds 1 ───> _num_started_over           ───────> abandons a plan begun before
    poll   watches                 <─────── _last_progress      <───────         at each batch handed over
    close  sets                    ───────> _closed                     ───────> ends

    of the serving thread alone: _active _broken _cancelled _polls _silent_polls _states _last_batch _thread
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from equipoise.distributed.communicator import Communicator
from equipoise.distributed.posted_sum import SumBetweenPolls
from equipoise.errors import EquipoiseError, InDoubtError, TransferCancelled, TransferError
from equipoise.transfer.execution.runner import OnCommit, TransferState, batches_of, start_over
from equipoise.transfer.execution.updater import CommittedBatch, ExpertLocationUpdater, StagedBatch
from equipoise.transfer.planning.types import TransferBatch, TransferPlan

logger = logging.getLogger("equipoise.transfer")


def silent_polls(num_polls: int) -> int:
    """Returns how many polls of the next batch send nothing, if the one before took ``num_polls``: half of them.

    A poll's message waits for nobody and still takes .3 to .9 ms from a forward pass on busy cores, and batches of a
    plan take about equally long: in the first half there is nothing to say. ``num_polls`` is the same on all ranks,
    so all of them leave out the same messages.
    """
    return num_polls // 2


class TransferWorker:
    """Stages in a thread of its own, one batch ahead of the commits.

    The ranks' states travel while the forward pass runs: a poll reads what all of them said in the poll before it. So
    the serving thread waits for no other rank, and a batch is committed one forward pass later.

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
        self._plan: TransferPlan | None = None
        self._active = False
        self._outcome: StagedBatch | TransferError | None = None
        self._failure: str | None = None
        self._broken = False
        self._last_batch: TransferBatch | None = None  # of the plan under way
        self._num_started_over = 0
        self._cancelled: str | None = None  # why the plan under way is to end without another commit
        self._closed = False
        self._last_progress = clock()
        self._states = SumBetweenPolls()  # ranks in each TransferState
        self._polls = 0  # for the batch under way; the same on all ranks
        self._silent_polls = 0
        self._thread = self._new_thread()

    @property
    def active(self) -> bool:
        return self._active

    @property
    def error(self) -> str | None:
        return self._failure or self._updater.error

    def start(self, plan: TransferPlan) -> None:
        with self._condition:
            assert not self._active
            if not plan.layers:
                return
            self._plan, self._active, self._cancelled = plan, True, None
            self._polls = self._silent_polls = 0
            self._last_batch = plan.layers[-1].batches[-1]
            self._last_progress = self._clock()
            self._condition.notify_all()

    def poll(self, communicator: Communicator, *, failed: bool = False) -> TransferState:
        if not self._active:
            return TransferState.BROKEN if self._broken else TransferState.IDLE
        self.proceed()
        self._polls += 1
        if self._polls <= self._silent_polls:
            return TransferState.WORKING
        counts = self._states.take()
        agreed = TransferState.WORKING if counts is None else self._agree(counts, communicator)
        if agreed == TransferState.WORKING:
            mine = self._state()
            told = {mine, TransferState.FAILED} if failed else {mine}
            self._states.post(communicator, [int(state in told) for state in TransferState])
        return agreed

    def commit(self, on_commit: OnCommit) -> CommittedBatch:
        with self._condition:
            outcome = self._outcome
        assert outcome is not None
        if self._cancelled is not None and not isinstance(outcome, TransferError):
            outcome = TransferCancelled(self._cancelled)
            with self._condition:
                self._num_started_over += 1
        if isinstance(outcome, TransferError):
            with self._condition:
                self._outcome, self._active = None, False
                self._failure = self._updater.error
                self._condition.notify_all()
            raise outcome
        try:
            committed = self._updater.commit(outcome)
            on_commit(outcome.layer_id, outcome.batch)
        finally:  # a rank that fails here keeps to the others' schedule of messages
            self._polls, self._silent_polls = 0, silent_polls(self._polls)
            with self._condition:
                self._outcome = None
                self._last_progress = self._clock()
                self._active = outcome.batch is not self._last_batch
        return committed

    def proceed(self) -> None:
        with self._condition:
            self._condition.notify_all()

    def cancel(self, reason: str) -> None:
        if self._active:
            self._cancelled = reason

    def close(self) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        self._thread.join(timeout=1.0)

    # On the serving thread ------------------------------------------------------------------------------------------

    def _state(self) -> TransferState:
        """How this rank stands; the watchdog looks here."""
        with self._condition:
            if self._outcome is not None:
                return TransferState.READY
            if self._broken:
                return TransferState.BROKEN
            if self._failure is None and not self._thread.is_alive() and not self._closed:
                self._failure = "the transfer thread has died"
            stalled = self._clock() - self._last_progress
            if self._failure is None and stalled > self._stall_timeout:
                self._failure = f"the transfer thread has made no progress for {stalled:.1f} s"
                self._broken = True
                logger.error("%s: no expert is moved any more", self._failure)
                return TransferState.BROKEN
            return TransferState.WORKING if self._failure is None else TransferState.IN_DOUBT

    def _agree(self, counts: list[int], communicator: Communicator) -> TransferState:
        """What all ranks do, given how many of them are in each state."""
        if counts[TransferState.BROKEN]:  # a thread may still write to what it staged: there is no way back
            self._active, self._broken = False, True
            return TransferState.BROKEN
        if counts[TransferState.FAILED]:
            return TransferState.FAILED
        if counts[TransferState.READY] == communicator.world_size:
            return TransferState.READY
        # Hazard: a rank that is still inside the transfer finds out by its own timeout. New groups before that would
        # let it talk on groups that the others have left.
        if counts[TransferState.WORKING] or not counts[TransferState.IN_DOUBT]:
            return TransferState.WORKING
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
        return TransferState.READY

    # On the transfer thread -----------------------------------------------------------------------------------------

    def _new_thread(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name="eplb-transfer", daemon=True)
        thread.start()
        return thread

    def _run(self) -> None:
        try:
            self._updater.bind_thread()
            while True:
                with self._condition:
                    self._condition.wait_for(lambda: self._plan is not None or self._closed)
                    if self._closed:
                        return
                    plan, self._plan = self._plan, None
                    number = self._num_started_over
                assert plan is not None
                self._run_plan(plan, number)
        except BaseException as error:  # whatever it is, the watchdog must be able to say it
            with self._condition:
                self._failure = f"{type(error).__name__}: {error}"
            if not isinstance(error, EquipoiseError):
                raise

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
