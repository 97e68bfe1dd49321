"""Runs a transfer plan step by step for a host that serves meanwhile: in its own thread, or inline.

Both runners have one interface, so a manager drives all modes alike::

    runner.start(plan)
    while runner.active:
        ... forward pass ...
        while runner.poll(communicator) == "ready":     # collective: the same answer on every rank
            report = runner.commit(update_maps)         # local; raises the TransferError that all ranks voted for

``poll`` is where ranks agree: a step is ready when every rank's staging and vote are behind it, so all of them commit
it between the same two forward passes. That also settles what a broken vote leaves in doubt: a rank whose worker
failed, died or hangs never reports ready, so nobody commits, and all ranks see "broken" in the same poll.

:class:`TransferWorker` needs groups of its own for its updater, apart from those of the forward pass and from the
``communicator`` that ``poll`` uses: two threads must not mix their messages on one group.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Literal, Protocol

import torch

from equipoise.communicator import Communicator
from equipoise.errors import EquipoiseError, InDoubtError, TransferError
from equipoise.transfer_plan import TransferPlan, TransferStep
from equipoise.transfer_report import LayerTransferReport
from equipoise.updater import ExpertLocationUpdater, StagedStep

PollResult = Literal["idle", "working", "ready", "broken"]
OnCommit = Callable[[int, TransferStep], None]


class TransferRunner(Protocol):
    """What a manager drives; see the module."""

    @property
    def active(self) -> bool:
        """A plan is under way. The same on every rank, between polls."""
        ...

    @property
    def error(self) -> str | None:
        """Why poll says "broken" (of this rank; None if it was another one's worker)."""
        ...

    def start(self, plan: TransferPlan) -> None:
        """Begins a plan, the same on every rank. Returns at once."""
        ...

    def poll(self, communicator: Communicator) -> PollResult:
        """Collective, from the serving thread: whether all ranks can commit the next step, or have failed it."""
        ...

    def commit(self, on_commit: OnCommit) -> LayerTransferReport:
        """After "ready": commits the step and calls ``on_commit(layer_id, step)``, which changes the maps.

        Raises:
            TransferError: the ranks voted against the step; the plan has ended, its earlier steps stand.
        """
        ...

    def close(self) -> None:
        """Ends the runner for good."""
        ...


class InlineRunner:
    """Stages in the serving thread, when polled: the stop-the-world and chunked modes.

    Args:
        updater: may share its communicator with the forward pass, since nothing runs at the same time.
    """

    def __init__(self, updater: ExpertLocationUpdater) -> None:
        self._updater = updater
        self._steps: Iterator[tuple[int, TransferStep]] = iter(())
        self._plan: TransferPlan | None = None
        self._outcome: StagedStep | TransferError | None = None
        self._next: tuple[int, TransferStep] | None = None
        self.error: str | None = None

    @property
    def active(self) -> bool:
        return self._next is not None or self._outcome is not None

    def start(self, plan: TransferPlan) -> None:
        assert not self.active
        self._plan = plan
        self._steps = _steps_of(plan)
        self._next = next(self._steps, None)

    def poll(self, communicator: Communicator) -> PollResult:
        del communicator  # the vote of the updater is all the agreement that is needed
        if self.error is not None:
            return "broken"
        if self._outcome is None:
            if self._next is None:
                return "idle"
            try:
                if self._plan is not None:
                    plan, self._plan = self._plan, None
                    self._updater.agree_on(plan)
                self._outcome = self._updater.stage(*self._next)
                self._next = next(self._steps, None)
            except TransferError as error:
                self._outcome, self._next = error, None
        return "ready"

    def commit(self, on_commit: OnCommit) -> LayerTransferReport:
        outcome, self._outcome = self._outcome, None
        assert outcome is not None
        if isinstance(outcome, TransferError):
            self.error = self._updater.broken
            raise outcome
        report = self._updater.commit(outcome)
        on_commit(outcome.layer_id, outcome.step)
        return report

    def close(self) -> None:
        self._next = self._outcome = None


class TransferWorker:
    """Stages in a thread of its own, one step ahead of the commits.

    Args:
        updater: with a communicator that nobody else uses.
        stall_timeout: seconds without progress after which the watchdog in :meth:`poll` calls the worker hung; more
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
        self._outcome: StagedStep | TransferError | None = None  # set by the thread, cleared by commit
        self._failure: str | None = None
        self._last_step: TransferStep | None = None  # of the plan under way
        self._closed = False
        self._last_progress = clock()
        self._thread = threading.Thread(target=self._run, name="eplb-transfer", daemon=True)
        self._thread.start()

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
            self._last_step = plan.layers[-1].steps[-1]
            self._last_progress = self._clock()
            self._condition.notify_all()

    def poll(self, communicator: Communicator) -> PollResult:
        # Ranks that are ready in the low half, ranks that are broken in the high half: one small sum tells all.
        state = torch.tensor([self._state()], dtype=torch.int64)
        communicator.all_reduce_sum_(state)
        broken, ready = divmod(int(state), 1 << 32)
        if broken:
            self._active = False
            return "broken"
        if not self._active:
            return "idle"
        return "ready" if ready == communicator.world_size else "working"

    def commit(self, on_commit: OnCommit) -> LayerTransferReport:
        with self._condition:
            outcome = self._outcome
        assert outcome is not None
        if isinstance(outcome, TransferError):
            with self._condition:
                self._outcome, self._active = None, False
                self._failure = self._updater.broken
            raise outcome
        report = self._updater.commit(outcome)
        on_commit(outcome.layer_id, outcome.step)
        with self._condition:
            self._outcome = None
            self._last_progress = self._clock()
            self._active = outcome.step is not self._last_step
            self._condition.notify_all()
        return report

    def close(self) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        self._thread.join(timeout=1.0)

    def _state(self) -> int:
        """1: an outcome waits for commit; ``1 << 32``: the watchdog has something to say; 0: still at work."""
        with self._condition:
            if self._outcome is not None:
                return 1
            if self._failure is None and not self._thread.is_alive() and not self._closed:
                self._failure = "the transfer thread has died"
            stalled = self._clock() - self._last_progress
            if self._failure is None and self._active and stalled > self._stall_timeout:
                self._failure = f"the transfer thread has made no progress for {stalled:.1f} s"
            return 0 if self._failure is None else 1 << 32

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._plan is not None or self._closed)
                if self._closed:
                    return
                plan, self._plan = self._plan, None
            assert plan is not None
            try:
                self._run_plan(plan)
            except BaseException as error:  # whatever it is, the watchdog must be able to say it
                with self._condition:
                    self._failure = f"{type(error).__name__}: {error}"
                if not isinstance(error, EquipoiseError):
                    raise
                return

    def _run_plan(self, plan: TransferPlan) -> None:
        """Raises what cannot be voted on: InDoubtError and bugs."""
        try:
            self._updater.agree_on(plan)
            for layer_id, step in _steps_of(plan):
                if not self._hand_over(self._updater.stage(layer_id, step)):
                    return
        except InDoubtError:
            raise
        except TransferError as error:
            self._hand_over(error)

    def _hand_over(self, outcome: StagedStep | TransferError) -> bool:
        """Waits until the serving thread has committed; False: the runner was closed meanwhile."""
        with self._condition:
            self._outcome = outcome
            self._last_progress = self._clock()
            self._condition.wait_for(lambda: self._outcome is None or self._closed)
            return not self._closed


def _steps_of(plan: TransferPlan) -> Iterator[tuple[int, TransferStep]]:
    for layer in plan.layers:
        for step in layer.steps:
            yield layer.layer_id, step
