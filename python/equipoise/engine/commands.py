"""Commands that only the embedded engine answers: what its forward passes took."""

from __future__ import annotations

from dataclasses import dataclass

from equipoise.manager.commands import Command
from equipoise.manager.reports import Phase


@dataclass(frozen=True)
class StepRecord:
    """One forward pass as rank 0 saw it."""

    forward_pass_id: int
    seconds: float  # forward pass and everything balancing added to it
    num_tokens: int
    phase: Phase


@dataclass(frozen=True)
class StepTotals:
    """Sums over every forward pass since start that was in one phase: they never fall."""

    phase: Phase
    num_tokens: int
    seconds: float
    durations: dict[float, int]  # steps of at most so many seconds, and of more than the bound before; the last is inf

    @property
    def num_steps(self) -> int:
        return sum(self.durations.values())


@dataclass(frozen=True)
class GetSteps(Command[list[StepRecord]]):
    """Ask for the last steps from forward pass ``since`` on, oldest first."""

    since: int = 0


@dataclass(frozen=True)
class GetStepTotals(Command[list[StepTotals]]):
    """Ask for all steps in sums, one for each phase that a step has been in."""
