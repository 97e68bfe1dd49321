"""RebalanceTimer and Reporter: where a rebalance's time goes, what it came to, and who is told."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from einops import reduce

from equipoise.errors import EquipoiseError
from equipoise.manager.commands import Rebalance
from equipoise.manager.failures import FailureWatch
from equipoise.manager.live_placement import LivePlacement
from equipoise.manager.migration import Migration
from equipoise.manager.planning import Migrate, Plan, Skip
from equipoise.manager.reports import (
    BalanceSummary,
    Outcome,
    RebalanceProfile,
    RebalanceReport,
    RebalanceTotals,
    describe,
    mean_of,
    summarize_balance,
)
from equipoise.placement.metadata import PlacementDiff
from equipoise.transfer.execution.profile import LayerProfile

OnReport = Callable[[RebalanceReport], None]
Answer = Callable[[RebalanceReport | EquipoiseError], None]


class RebalanceTimer:
    """Told of each turn of a rebalance; a tick that no forward pass waits for is no stall.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._gather = 0.0
        self._began = 0.0
        self._plan_came: float | None = None
        self._stall = 0.0  # in ticks that have ended
        self._tick_began: float | None = None  # None: no forward pass waits

    def enter_tick(self, *, idle: bool) -> None:
        self._tick_began = None if idle else self._clock()

    def leave_tick(self) -> None:
        if self._tick_began is not None:
            self._stall += self._clock() - self._tick_began
        self._tick_began = None

    def begin(self) -> None:
        """A rebalance begins, in the tick that was entered."""
        self._began, self._plan_came, self._stall = self._clock(), None, 0.0

    def load_gathered(self) -> None:
        self._gather = self._clock() - self._began

    def plan_arrived(self) -> None:
        """All ranks have the plan."""
        self._plan_came = self._clock()

    def profile(
        self, plan: Plan | None, *, migrated: bool, peak_staging_bytes: int, layers: list[LayerProfile]
    ) -> RebalanceProfile:
        """The rebalance ends, and with it what the tick adds to its stall.

        Args:
            plan: None if planning failed.
            migrated: whether a migration was begun.
            peak_staging_bytes: of this rank, 0 without a migration.
            layers: its commits.
        """
        self.leave_tick()
        now = self._clock()
        plan_came = now if self._plan_came is None else self._plan_came
        return RebalanceProfile(
            gather_seconds=self._gather,
            plan_seconds=plan.seconds if plan is not None else 0.0,
            plan_transfer_seconds=plan.transfer_seconds if isinstance(plan, Migrate) else 0.0,
            wait_seconds=plan_came - self._began,
            migrate_seconds=now - plan_came if migrated else 0.0,
            stall_seconds=self._stall,
            peak_staging_bytes=peak_staging_bytes,
            layers=layers,
        )


@dataclass
class Attempt:
    """A rebalance from its cause to its end."""

    algorithm: str  # that is to plan
    request: Rebalance | None = None  # None: a periodic one
    answer: Answer | None = None
    plan: Plan | None = None
    migrating: bool = False
    forward_pass_id: int = 0


class Reporter:
    """Reports rebalances that end, one after the other.

    Args:
        failures: told of what a callback raises.
        on_report: told of every rebalance that ends.
        profile: log where the time went.

    Attributes:
        last_report: of the last rebalance that ended.
        totals: sums over all that have ended.
    """

    def __init__(
        self,
        placement: LivePlacement,
        migration: Migration,
        timer: RebalanceTimer,
        failures: FailureWatch,
        on_report: OnReport | None,
        *,
        profile: bool,
    ) -> None:
        self.last_report: RebalanceReport | None = None
        self.totals = RebalanceTotals()
        self._placement = placement
        self._migration = migration
        self._timer = timer
        self._failures = failures
        self._on_report = on_report
        self._profile = profile

    def end(self, attempt: Attempt, error: str | None, *, cancelled: bool) -> None:
        """Tells everybody about an attempt. ``error``: why it failed or was cancelled; None if neither."""
        report = None
        with self._failures.guard("reporting a rebalance"):
            report = self._report(attempt, error, cancelled)
            self.last_report, self.totals = report, self.totals.plus(report)
            self._log(report)
        with self._failures.guard("a callback at the end of a rebalance"):
            if attempt.answer is not None:
                attempt.answer(report or EquipoiseError("the rebalance has ended, but could not be reported"))
            if self._on_report is not None and report is not None:
                self._on_report(report)

    def _log(self, report: RebalanceReport) -> None:
        """One line where rank 0 is seen; the other ranks say the same at level DEBUG."""
        level = logging.WARNING if report.outcome == "failed" else logging.INFO
        self._failures.log.log(
            level if self._failures.rank == 0 else logging.DEBUG, "%s", describe(report, profile=self._profile)
        )

    def _report(self, attempt: Attempt, error: str | None, cancelled: bool) -> RebalanceReport:
        migration = self._migration if attempt.migrating else None
        num_ranks = self._placement.metadata.topology.num_ranks
        profile = self._timer.profile(
            attempt.plan,
            migrated=migration is not None,
            peak_staging_bytes=migration.peak_staging_bytes if migration is not None else 0,
            layers=list(migration.profiles) if migration is not None else [],
        )
        return rebalance_report(
            self._placement,
            attempt,
            profile=profile,
            per_rank_bytes=migration.bytes_over_ranks() if migration else np.zeros((num_ranks, 4), dtype=np.int64),
            error=error,
            cancelled=cancelled,
        )


def rebalance_report(
    placement: LivePlacement,
    attempt: Attempt,
    *,
    profile: RebalanceProfile,
    per_rank_bytes: np.ndarray,
    error: str | None,
    cancelled: bool,
) -> RebalanceReport:
    """The report of a rebalance that ended.

    Args:
        per_rank_bytes: (G, 4) int64 as :meth:`~equipoise.manager.migration.Migration.bytes_over_ranks` gives it.
        error: why it failed or was cancelled; None if neither.
    """
    plan = attempt.plan  # None if planning itself failed or was cancelled
    num_layers, num_nodes = placement.metadata.num_layers, placement.metadata.topology.num_nodes
    nothing = np.zeros(num_layers, dtype=np.int64)
    diff = plan.diff if isinstance(plan, Migrate) else PlacementDiff(nothing, nothing, nothing)
    unknown: list[float | None] = [None] * num_layers
    before = plan.balancedness_before if plan is not None else unknown
    after = before if plan is None or isinstance(plan, Skip) else plan.balancedness_after
    sent, received, node_sent, node_received = per_rank_bytes.T
    per_node = "(node rank) -> node"
    return RebalanceReport(
        outcome=_outcome(attempt, error, cancelled),
        action=plan.action if plan is not None else "skip",
        reason=plan.reason if plan is not None else error or "planning failed",
        algorithm=attempt.algorithm,
        forward_pass_id=attempt.forward_pass_id,
        window_steps=plan.window_steps if plan is not None else 0,
        layer_ids=placement.layer_ids,
        balancedness_before=before,
        balancedness_after=after,
        mean_balancedness_before=mean_of(before),
        mean_balancedness_after=mean_of(after),
        balance_before=_summary(plan, placement, after=False),
        balance_after=_summary(plan, placement, after=True),
        slots_changed=diff.slots_changed.tolist(),
        moves=diff.moves.tolist(),
        cross_node_moves=diff.cross_node_moves.tolist(),
        bytes_sent_per_rank=sent.tolist(),
        bytes_received_per_rank=received.tolist(),
        bytes_sent_per_node=reduce(node_sent, per_node, "sum", node=num_nodes).tolist(),
        bytes_received_per_node=reduce(node_received, per_node, "sum", node=num_nodes).tolist(),
        planning_seconds=plan.seconds if plan is not None else 0.0,
        transfer_seconds=profile.migrate_seconds,
        stall_seconds=profile.stall_seconds,
        profile=profile,
        error=error,
    )


def _summary(plan: Plan | None, placement: LivePlacement, *, after: bool) -> BalanceSummary | None:
    if plan is None:
        return None
    load = plan.rank_load_after if after and not isinstance(plan, Skip) else plan.rank_load_before
    return summarize_balance(load, placement.layer_ids)


def _outcome(attempt: Attempt, error: str | None, cancelled: bool) -> Outcome:
    if cancelled:
        return "cancelled"
    if error is not None:
        return "failed"
    if attempt.plan is None or isinstance(attempt.plan, Skip):
        return "skipped"
    return "dry_run" if attempt.request is not None and attempt.request.dry_run else "committed"
