"""Log of forward passes on rank 0, and the commands that ask for it: the last ones one by one, all of them in sums."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
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


_STEPS_KEPT = 10_000
_BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, float("inf"))
"""Upper bounds, in seconds, of the classes that durations are counted in."""


class StepLog:
    """Keep steps in the order of their noting. Sums are kept apart: a client that asks rarely misses no step.

    Args:
        kept: steps that are remembered one by one.
    """

    def __init__(self, kept: int = _STEPS_KEPT) -> None:
        self._last: deque[StepRecord] = deque(maxlen=kept)
        self._durations: dict[Phase, list[int]] = {}
        self._tokens: dict[Phase, int] = {}
        self._seconds: dict[Phase, float] = {}

    def note(self, step: StepRecord) -> None:
        self._last.append(step)
        phase = step.phase
        self._durations.setdefault(phase, [0] * len(_BOUNDS))[bisect_left(_BOUNDS, step.seconds)] += 1
        self._tokens[phase] = self._tokens.get(phase, 0) + step.num_tokens
        self._seconds[phase] = self._seconds.get(phase, 0.0) + step.seconds

    def since(self, forward_pass_id: int) -> list[StepRecord]:
        """Those still remembered from ``forward_pass_id`` on, oldest first."""
        return [step for step in self._last if step.forward_pass_id >= forward_pass_id]

    def totals(self) -> list[StepTotals]:
        """One entry for each phase that a step has been in."""
        return [
            StepTotals(phase, self._tokens[phase], self._seconds[phase], dict(zip(_BOUNDS, counts, strict=True)))
            for phase, counts in self._durations.items()
        ]
