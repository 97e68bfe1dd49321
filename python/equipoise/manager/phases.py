"""The phase machine: when a rebalance begins, what each tick does for it, and how it ends.

::

    collecting ──due or requested──> planning ──a placement worth moving to──> migrating ──last layer──> collecting
                                        └──────────────skip or dry run──────────────────────────────────────┘
    failed: the group of ranks is broken; the last committed placement serves on, nothing is rebalanced any more
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from equipoise.algorithms.registry import HISTORY, check_algorithm
from equipoise.config import EplbConfig
from equipoise.errors import ConfigError, PhaseError, TransferError
from equipoise.manager.background_planner import BackgroundPlanner, PlanningFailed
from equipoise.manager.commands import Phase, Rebalance, RebalanceReport, RebalanceTotals
from equipoise.manager.migration import Migration, MigrationBroken
from equipoise.manager.planning import PlannedRebalance, plan_rebalance
from equipoise.manager.recording import LoadRecording
from equipoise.manager.replies import rebalance_report
from equipoise.manager.timing import RebalanceTimer
from equipoise.placement.metadata import ExpertLocationMetadata

_LONGEST_WAIT = 64
"""Periods after which a rebalance is tried again at the latest, however often it has failed."""

OnReport = Callable[[RebalanceReport], None]


class Rebalancing:
    """One rebalance at a time, from its cause to its report. Every rank has one and calls it alike.

    Args:
        metadata: the live placement.
        load: what plans are made from.
        planner: runs them on rank 0.
        migration: takes the live placement to the planned one.
        max_staged_experts: experts a rank can stage at once.
        num_groups: groups of group-limited routing, if the model has it.
        clock: seconds, monotonic.
        on_report: told of every rebalance that ends.

    Attributes:
        phase: the same on all ranks, between ticks.
        error: why the phase is failed, or why the last rebalance failed.
        last_report: of the last rebalance that ended.
        totals: sums over all that have ended.
    """

    def __init__(
        self,
        config: EplbConfig,
        metadata: ExpertLocationMetadata,
        load: LoadRecording,
        planner: BackgroundPlanner[PlannedRebalance],
        migration: Migration,
        *,
        max_staged_experts: int,
        num_groups: int | None,
        clock: Callable[[], float],
        on_report: OnReport | None,
    ) -> None:
        self.phase: Phase = "collecting"
        self.error: str | None = None
        self.last_report: RebalanceReport | None = None
        self.totals = RebalanceTotals()
        self._config = config
        self._metadata = metadata
        self._load = load
        self._planner = planner
        self._migration = migration
        self._max_staged_experts = max_staged_experts
        self._num_groups = num_groups
        self._clock = clock
        self._on_report = on_report
        self._timer = RebalanceTimer(clock)
        self._request: Rebalance | None = None
        self._answer: OnReport | None = None
        self._plan: PlannedRebalance | None = None
        self._forward_pass_id = 0
        self._steps_since_last = 0
        self._steps_to_wait = config.eplb_rebalance_num_iterations

    @property
    def wants_tick(self) -> bool:
        """Work is pending that ticks carry on even when no request runs. The same on all ranks."""
        return self.phase in ("planning", "migrating") or self._request is not None

    @property
    def layers_pending(self) -> int:
        """Layers of a migration under way that have not committed yet."""
        return self._migration.layers_pending

    def request(self, request: Rebalance, answer: OnReport) -> None:
        """Has the next tick begin a rebalance; ``answer`` is told of its end.

        Raises:
            PhaseError: another one is under way, or nothing is rebalanced any more.
            ConfigError: a value that cannot be.
        """
        if self.phase == "failed":
            raise PhaseError(f"rebalancing has stopped: {self.error}")
        if self._request is not None or self.phase != "collecting":
            raise PhaseError(f"a rebalance is under way (phase {self.phase}, {self.layers_pending} layers to go)")
        if request.algorithm is not None:
            check_algorithm(request.algorithm, field="algorithm")
        for name in ("max_moves_per_layer", "window_steps"):
            value, least = getattr(request, name), int(name == "window_steps")
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}", field=name)
        if request.move_price is not None and not 0 <= request.move_price < math.inf:
            raise ConfigError(f"move_price must be finite and at least 0, got {request.move_price}", field="move_price")
        self._request, self._answer = request, answer

    def end_step(self, *, counted: bool) -> None:
        """A forward pass has ended; ``counted``: it is load, and brings the next periodic rebalance closer."""
        self._steps_since_last += counted

    def tick(self, *, forward_pass_id: int, idle: bool) -> None:
        """Collective: carries the rebalance on, or begins one.

        Args:
            forward_pass_id: of the step to come.
            idle: no forward pass has run since the last tick.
        """
        self._forward_pass_id = forward_pass_id
        self._timer.enter_tick(idle=idle)
        if self.phase == "collecting" and (self._request is not None or self._due()):
            self._begin_planning()
        elif self.phase == "planning":
            self._poll_planning(idle)
        elif self.phase == "migrating":
            self._migrate(idle)
        self._timer.leave_tick()

    def _due(self) -> bool:
        return self._config.enable_eplb and self._steps_since_last >= self._steps_to_wait

    def _algorithm(self) -> str:
        return (self._request.algorithm if self._request else None) or self._config.eplb_algorithm

    def _begin_planning(self) -> None:
        self._timer.begin()
        asked = self._request.window_steps if self._request is not None else None
        windows = self._load.windows(HISTORY, asked)
        self._timer.load_gathered()
        job = partial(
            plan_rebalance,
            windows.numpy(),
            self._metadata.clone("cpu"),
            self._config,
            algorithm=self._algorithm(),
            request=self._request,
            window_steps=self._load.window_steps(asked),
            num_groups=self._num_groups,
            max_staged_experts=self._max_staged_experts,
            clock=self._clock,
        )
        self._planner.start(job)
        self.phase = "planning"

    def _poll_planning(self, idle: bool) -> None:
        try:
            plan = self._planner.poll(idle=idle)
        except PlanningFailed as failure:
            self._end(error=f"planning failed: {failure}")
            return
        if plan is None:
            return
        self._timer.plan_arrived()
        self._plan = plan
        dry_run = self._request is not None and self._request.dry_run
        if plan.decision.action == "skip" or dry_run:
            self._end(error=plan.error)
            return
        self._migration.begin(plan.placement(self._metadata), plan.transfer)
        self.phase = "migrating"

    def _migrate(self, idle: bool) -> None:
        try:
            arrived = self._migration.advance(idle=idle)
        except TransferError as error:
            self._end(error=f"{type(error).__name__}: {error}", broken=isinstance(error, MigrationBroken))
            return
        if arrived:
            self._end()

    def _end(self, error: str | None = None, broken: bool = False) -> None:
        plan, migration, migrated = self._plan, self._migration, self.phase == "migrating"
        nothing = np.zeros((self._metadata.topology.num_ranks, 4), dtype=np.int64)
        report = rebalance_report(
            self._metadata,
            plan,
            request=self._request,
            algorithm=self._algorithm(),
            forward_pass_id=self._forward_pass_id,
            profile=self._timer.profile(
                plan,
                migrated=migrated,
                peak_staging_bytes=migration.peak_staging_bytes if migrated else 0,
                layers=list(migration.profiles) if migrated else [],
            ),
            per_rank_bytes=migration.bytes_over_ranks() if migrated else nothing,
            error=error,
        )
        self.last_report, self.error, self.totals = report, error, self.totals.plus(report)
        # After a failure the next try of our own waits twice as long as the last one did.
        period = self._config.eplb_rebalance_num_iterations
        self._steps_to_wait = min(2 * self._steps_to_wait, _LONGEST_WAIT * period) if error else period
        self._steps_since_last = 0
        answer = self._answer
        self._request = self._answer = self._plan = None
        self.phase = "failed" if broken else "collecting"
        for tell in (answer, self._on_report):
            if tell is not None:
                tell(report)
