"""Where the time of the rebalance under way goes, as one rank sees it."""

from __future__ import annotations

from collections.abc import Callable

from equipoise.manager.commands import RebalanceProfile
from equipoise.manager.planning import PlannedRebalance
from equipoise.transfer.execution.profile import LayerProfile


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
        self, planned: PlannedRebalance | None, *, migrated: bool, peak_staging_bytes: int, layers: list[LayerProfile]
    ) -> RebalanceProfile:
        """The rebalance ends, and with it what the tick adds to its stall.

        Args:
            planned: None if planning failed.
            migrated: whether a migration was begun.
            peak_staging_bytes: of this rank, 0 without a migration.
            layers: its commits.
        """
        self.leave_tick()
        now = self._clock()
        plan_came = now if self._plan_came is None else self._plan_came
        return RebalanceProfile(
            gather_seconds=self._gather,
            plan_seconds=planned.seconds if planned is not None else 0.0,
            plan_transfer_seconds=planned.transfer_seconds if planned is not None else 0.0,
            wait_seconds=plan_came - self._began,
            migrate_seconds=now - plan_came if migrated else 0.0,
            stall_seconds=self._stall,
            peak_staging_bytes=peak_staging_bytes,
            layers=layers,
        )
