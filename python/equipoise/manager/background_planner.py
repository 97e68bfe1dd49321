"""Planning beside the forward passes: rank 0 computes in a thread, all ranks learn the result in the same tick."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Generic, TypeVar

from equipoise.algorithms.problem import DispatchKind
from equipoise.algorithms.registry import HISTORY
from equipoise.config import EplbConfig
from equipoise.distributed.communicator import Communicator
from equipoise.distributed.posted_sum import SumBetweenPolls
from equipoise.load.recorder import ExpertDistributionRecorder
from equipoise.manager.commands import Rebalance
from equipoise.manager.failures import FailureWatch
from equipoise.manager.live_placement import LivePlacement
from equipoise.manager.planning import Plan, plan_rebalance
from equipoise.manager.reporting import RebalanceTimer

Result = TypeVar("Result")

_IDLE_WAIT_SECONDS = 0.005
"""How long a poll without a forward pass beside it waits for the thread, instead of spinning."""


class PlanningFailed(Exception):
    """What the job raised on rank 0, as text; raised by the same poll on every rank."""


def _pickled(job: Callable[[], object]) -> bytes:
    """The job's result as it travels: what cannot be pickled fails here, not in the broadcast that others wait in."""
    return pickle.dumps(job())


class BackgroundPlanner(Generic[Result]):
    """One job at a time.

    Args:
        communicator: of the serving thread.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="eplb-planner")
        self._job: Future[bytes] | None = None
        self._ended = SumBetweenPolls()  # rank 0's word

    def prepare(self, job: Callable[[], object]) -> None:
        """Runs something before the first plan, on rank 0 only; a plan that is asked for meanwhile waits behind it."""
        if self._communicator.rank == 0:
            self._executor.submit(job)

    def start(self, job: Callable[[], Result]) -> None:
        """Begins a job; only rank 0's runs. Its result must be picklable."""
        if self._communicator.rank == 0:
            self._job = self._executor.submit(_pickled, job)

    def poll(self, *, idle: bool) -> Result | None:
        """Collective. The result, on every rank, in the second poll after the job has ended.

        Whether it has ended travels beside the forward pass between two polls, so that nobody waits for it.

        Args:
            idle: no forward pass runs between polls: wait a little for the job.

        Raises:
            PlanningFailed: the job did.
        """
        if self._ended.take() == [1]:
            return self._share()
        self._ended.post(self._communicator, [int(self._job is not None and self._has_ended(self._job, idle))])
        return None

    def _share(self) -> Result:
        message: tuple[bytes, str | None] | None = None
        if self._job is not None:
            failure = self._job.exception()
            message = (b"", f"{type(failure).__name__}: {failure}") if failure else (self._job.result(), None)
            self._job = None
        message = self._communicator.broadcast_object(message, src=0)
        assert message is not None
        payload, failed = message
        if failed is not None:
            raise PlanningFailed(failed)
        return self._read(payload)

    def _read(self, payload: bytes) -> Result:
        """Collective: a plan that one rank cannot read is followed by none."""
        result: Result | None = None
        failure: str | None = None
        try:
            result = pickle.loads(payload)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        failures = self._communicator.all_gather_object(failure)
        if any(failures):
            raise PlanningFailed("; ".join(f"rank {rank}: {text}" for rank, text in enumerate(failures) if text))
        assert result is not None
        return result

    def abandon(self) -> None:
        """Collective. Drops the job under way: its result reaches nobody; one that runs already runs out."""
        if self._job is not None:
            self._job.cancel()
            self._job = None
        self._ended.take()

    def close(self) -> None:
        """Ends the thread; a job under way runs out, its result is dropped."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    @staticmethod
    def _has_ended(job: Future[bytes], idle: bool) -> bool:
        if idle:
            try:
                job.exception(timeout=_IDLE_WAIT_SECONDS)
            except TimeoutError:
                return False
        return job.done()


class RebalancePlanner:
    """Plans one rebalance at a time from the load window of its beginning. Every rank has one and calls it alike.

    Args:
        placement: the live one.
        recorder: its load window is what plans are made from.
        failures: makes an error of one rank known to all.
        timer: told of what has been done.
        dispatch: how tokens are split over replicas; what plans are made for.
        num_groups: groups of group-limited routing, if the model has it.
        max_staged_experts: what transfer plans are made for; None: none is made.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        config: EplbConfig,
        placement: LivePlacement,
        recorder: ExpertDistributionRecorder,
        background: BackgroundPlanner[Plan],
        failures: FailureWatch,
        timer: RebalanceTimer,
        *,
        dispatch: DispatchKind,
        num_groups: int | None,
        max_staged_experts: int | None,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._placement = placement
        self._recorder = recorder
        self._background = background
        self._failures = failures
        self._timer = timer
        self.dispatch: DispatchKind = dispatch
        self._num_groups = num_groups
        self._max_staged_experts = max_staged_experts
        self._clock = clock

    def begin(self, algorithm: str, request: Rebalance | None) -> str | None:
        """Collective. Gathers the load and has rank 0 plan; why it could not, of all ranks, or None.

        Args:
            request: the operator's, or None for a periodic rebalance.
        """
        self._timer.begin()
        asked = request.window_steps if request is not None else None
        with self._failures.guard("reading the load window"):
            windows = self._recorder.local_windows(HISTORY, asked)
        failure = self._failures.agree()
        if failure is not None:
            return failure
        load = self._recorder.sum_over_ranks(windows).numpy()
        self._timer.load_gathered()
        with self._failures.guard("starting to plan"):
            job = partial(
                plan_rebalance,
                load,
                self._placement.snapshot(),
                self._config,
                algorithm=algorithm,
                request=request,
                window_steps=self._recorder.window_steps(asked),
                num_groups=self._num_groups,
                max_staged_experts=self._max_staged_experts,
                clock=self._clock,
                dispatch=self.dispatch,
            )
            self._background.start(job)
        return None

    def poll(self, *, idle: bool) -> Plan | None:
        """Collective; see :meth:`BackgroundPlanner.poll`."""
        plan = self._background.poll(idle=idle)
        if plan is not None:
            self._timer.plan_arrived()
        return plan

    def abandon(self) -> None:
        """Collective; see :meth:`BackgroundPlanner.abandon`."""
        self._background.abandon()
