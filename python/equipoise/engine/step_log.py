"""Log of forward passes on rank 0: the last ones one by one, all of them in sums."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque

from equipoise.engine.commands import StepRecord, StepTotals
from equipoise.manager.reports import Phase

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
