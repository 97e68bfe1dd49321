"""Planning beside the forward passes: rank 0 computes in a thread, all ranks learn the result in the same tick."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from equipoise.distributed.communicator import Communicator
from equipoise.distributed.posted_sum import SumBetweenPolls

Result = TypeVar("Result")

_IDLE_WAIT_SECONDS = 0.005
"""How long a poll without a forward pass beside it waits for the thread, instead of spinning."""


class PlanningFailed(Exception):
    """What the job raised on rank 0, as text; raised by the same poll on every rank."""


class BackgroundPlanner(Generic[Result]):
    """One job at a time.

    Args:
        communicator: of the serving thread.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="eplb-planner")
        self._job: Future[Result] | None = None
        self._ended = SumBetweenPolls()  # rank 0's word

    def prepare(self, job: Callable[[], object]) -> None:
        """Runs something before the first plan, on rank 0 only; a plan that is asked for meanwhile waits behind it."""
        if self._communicator.rank == 0:
            self._executor.submit(job)

    def start(self, job: Callable[[], Result]) -> None:
        """Begins a job; only rank 0's runs. Its result must be picklable."""
        if self._communicator.rank == 0:
            self._job = self._executor.submit(job)

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
        message: tuple[Result | None, str | None] | None = None
        if self._job is not None:
            failure = self._job.exception()
            message = (None, f"{type(failure).__name__}: {failure}") if failure else (self._job.result(), None)
            self._job = None
        message = self._communicator.broadcast_object(message, src=0)
        assert message is not None
        result, failed = message
        if failed is not None:
            raise PlanningFailed(failed)
        return result  # type: ignore[return-value]

    def close(self) -> None:
        """Ends the thread; a job under way runs out, its result is dropped."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    @staticmethod
    def _has_ended(job: Future[Result], idle: bool) -> bool:
        if idle:
            try:
                job.exception(timeout=_IDLE_WAIT_SECONDS)
            except TimeoutError:
                return False
        return job.done()
