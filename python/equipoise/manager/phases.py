"""The phase machine: when a rebalance begins, what each tick does for it, and how it ends.

::

    collecting ──due or requested──> planning ──Reweight or Migrate──> migrating ──last layer──> collecting
        │ ^                             └────────Skip or dry run──────────────────────────────────────┘
        v │ resume
      paused: no rebalance begins; one that was under way has been cancelled
      failed: the ranks cannot talk, or code of ours or of the host raised; the last committed placement serves on
"""

from __future__ import annotations

import math
from collections.abc import Callable

from equipoise.algorithms.registry import check_algorithm
from equipoise.config import EplbConfig
from equipoise.errors import ConfigError, PhaseError, TransferCancelled, TransferError
from equipoise.manager.background_planner import PlanningFailed, RebalancePlanner
from equipoise.manager.commands import Rebalance
from equipoise.manager.failures import FailureWatch
from equipoise.manager.live_placement import LivePlacement
from equipoise.manager.migration import Migration, MigrationBroken
from equipoise.manager.planning import Migrate, Reweight, Skip
from equipoise.manager.reporting import Answer, Attempt, RebalanceTimer, Reporter
from equipoise.manager.reports import Phase
from equipoise.transfer.planning.types import TransferPlan

_MAX_BACKOFF = 64  # periods after which a rebalance is tried again at the latest, however often it has failed


class Rebalancing:
    """One rebalance at a time, from its cause to its report. Every rank has one and calls it alike.

    Args:
        placement: the live one.
        planner: makes the plans.
        migration: takes the live placement to the planned one.
        failures: makes an error of one rank known to all.
        reporter: reports rebalances that end.
        timer: told of each tick.
    """

    def __init__(
        self,
        config: EplbConfig,
        placement: LivePlacement,
        planner: RebalancePlanner,
        migration: Migration,
        failures: FailureWatch,
        reporter: Reporter,
        timer: RebalanceTimer,
    ) -> None:
        self._phase: Phase = "collecting"
        self._error: str | None = None
        self._pause_reason: str | None = None
        self._on_paused: list[Callable[[], None]] = []
        self._config = config
        self._placement = placement
        self._planner = planner
        self._migration = migration
        self._failures = failures
        self._reporter = reporter
        self._timer = timer
        self._attempt: Attempt | None = None  # under way, or about to begin
        self._forward_pass_id = 0
        self._steps_since_last = 0
        self._steps_to_wait = config.eplb_rebalance_num_iterations

    @property
    def phase(self) -> Phase:
        """The same on all ranks, between ticks."""
        return "paused" if self._phase == "collecting" and self._pause_reason is not None else self._phase

    @property
    def error(self) -> str | None:
        """Why the phase is failed or paused, or why the last rebalance failed."""
        return f"paused: {self._pause_reason}" if self.phase == "paused" else self._error

    @property
    def wants_tick(self) -> bool:
        """Work is pending that ticks carry on even when no request runs. The same on all ranks."""
        if self._phase == "failed":
            return False
        return self._attempt is not None or self._failures.under_way

    @property
    def layers_pending(self) -> int:
        """Layers of a migration under way that have not committed yet."""
        return self._migration.layers_pending

    def request(self, request: Rebalance, answer: Answer) -> None:
        """Has the next tick begin a rebalance; ``answer`` is told of its end.

        Raises:
            PhaseError: another one is under way, or nothing is rebalanced now or any more.
            ConfigError: a value that cannot be.
        """
        self._require_not_failed()
        if self._pause_reason is not None:
            raise PhaseError(f"rebalancing is paused: {self._pause_reason}")
        if self._attempt is not None:
            stage = {"collecting": "begins in the next tick", "planning": "is being planned"}
            how_far = stage.get(self._phase, f"is migrating, {self.layers_pending} layers to go")
            raise PhaseError(f"another rebalance {how_far}")
        if request.algorithm is not None:
            check_algorithm(request.algorithm, dispatch=self._planner.dispatch)
        for name, minimum in (("max_moves_per_layer", 0), ("window_steps", 1), ("move_price", 0)):
            value = getattr(request, name)
            if value is not None and not minimum <= value < math.inf:
                raise ConfigError(f"{name} must be finite and at least {minimum}, got {value}", field=name)
        self._attempt = Attempt(request.algorithm or self._config.eplb_algorithm, request, answer)

    def pause(self, reason: str, done: Callable[[], None]) -> None:
        """Collective. Lets no rebalance begin and cancels one under way; ``done`` is called once nothing moves.

        Raises:
            PhaseError: nothing is rebalanced any more.
        """
        self._require_not_failed()
        self._pause_reason, why = reason, f"paused: {reason}"
        if self._phase == "migrating":
            self._migration.cancel(why)
            self._on_paused.append(done)
            return
        if self._phase == "planning":
            self._planner.abandon()
            self._end(why, cancelled=True)
        elif self._attempt is not None:
            self._timer.begin()
            self._end(why, cancelled=True)
        done()

    def resume(self) -> None:
        """Collective. Lets rebalances begin again."""
        self._pause_reason = None

    def _require_not_failed(self) -> None:
        if self._phase == "failed":
            raise PhaseError(f"rebalancing has stopped: {self._error}")

    def end_step(self, *, counted: bool) -> None:
        """A forward pass has ended; ``counted``: it is load, and brings the next periodic rebalance closer."""
        self._steps_since_last += counted

    def tick(self, *, forward_pass_id: int, idle: bool) -> None:
        """Collective: carries the rebalance on, or begins one. Raises nothing: an error ends in phase ``failed``.

        Args:
            forward_pass_id: of the step to come.
            idle: no forward pass has run since the last tick.
        """
        if self._phase == "failed":
            return
        self._forward_pass_id = forward_pass_id
        self._timer.enter_tick(idle=idle)
        try:
            if (failure := self._failures.take()) is not None:
                self._fail(failure)
            else:
                self._carry_on(idle)
        except TransferError as error:
            self._fail(f"the ranks cannot talk any more: {error}")
        except Exception as error:  # the others learn of it when code next runs on all ranks
            self._failures.note("a tick", error)
        self._timer.leave_tick()

    def _carry_on(self, idle: bool) -> None:
        before = self._phase
        if self._phase == "planning":
            self._poll_planning(idle)
        elif self._phase == "migrating":
            self._migrate(idle)
        elif self._pause_reason is None:
            due = self._config.enable_eplb and self._steps_since_last >= self._steps_to_wait
            if due or self._attempt is not None:
                self._begin_planning()
        if self._phase != "failed":
            self._failures.end_tick(tell=self._phase != before)
            self._migration.end_tick()

    def _begin_planning(self) -> None:
        self._attempt = self._attempt or Attempt(self._config.eplb_algorithm)
        failure = self._planner.begin(self._attempt.algorithm, self._attempt.request)
        if failure is not None:
            self._fail(failure)
        else:
            self._phase = "planning"

    def _poll_planning(self, idle: bool) -> None:
        try:
            plan = self._planner.poll(idle=idle)
        except PlanningFailed as failure:
            self._end(f"planning failed: {failure}")
            return
        if plan is None:
            return
        assert self._attempt is not None
        self._attempt.plan = plan
        match plan:
            case Skip():
                self._end(plan.error)
            case _ if self._attempt.request is not None and self._attempt.request.dry_run:
                self._end()
            case Reweight():
                self._begin_migrating(plan, None)
            case Migrate():
                self._begin_migrating(plan, plan.transfer)

    def _begin_migrating(self, plan: Reweight | Migrate, transfer: TransferPlan | None) -> None:
        assert self._attempt is not None
        self._phase, self._attempt.migrating = "migrating", True
        with self._failures.guard("starting the migration"):
            self._migration.begin(plan.placement(self._placement.committed), transfer)

    def _migrate(self, idle: bool) -> None:
        try:
            if self._migration.advance(idle=idle):
                self._end()
        except TransferCancelled as error:
            self._end(str(error), cancelled=True)
        except TransferError as error:
            reason = f"{type(error).__name__}: {error}"
            if isinstance(error, MigrationBroken):
                self._fail(reason)
            else:
                self._end(reason)

    def _end(self, error: str | None = None, *, cancelled: bool = False) -> None:
        attempt, self._attempt = self._attempt, None
        assert attempt is not None
        attempt.forward_pass_id = self._forward_pass_id
        # After a failure the next try of our own waits twice as long as the last one did.
        period = self._config.eplb_rebalance_num_iterations
        failed = error is not None and not cancelled
        self._steps_to_wait = min(2 * self._steps_to_wait, _MAX_BACKOFF * period) if failed else period
        self._phase, self._error, self._steps_since_last = "collecting", error, 0
        self._reporter.end(attempt, error, cancelled=cancelled)
        while self._on_paused:
            with self._failures.guard("a callback once nothing moves"):
                self._on_paused.pop()()

    def _fail(self, reason: str) -> None:
        """Ends rebalancing for good; a thread that still transfers commits nothing any more."""
        self._failures.log.error("rebalancing has stopped: %s", reason)
        self._migration.cancel(reason)
        if self._attempt is not None:
            self._end(reason)
        self._phase, self._error = "failed", reason
