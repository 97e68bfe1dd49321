"""Many ways to balance, played side by side: algorithms x redundancy x interval x dispatch, beside their baselines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from equipoise.errors import ConfigError
from equipoise.load.trace import LoadTrace
from equipoise.replay.baselines import forced_even, oracle
from equipoise.replay.costs import CostModel
from equipoise.replay.live import LiveSettings, replay_live
from equipoise.topology import EpTopology

BASELINES = ("nothing", "oracle", "force-balanced")
TIMER = "deepseek on a timer"


@dataclass(frozen=True)
class Candidate:
    """One row to play.

    Attributes:
        kind: ``live`` for settings, else a baseline's name.
    """

    kind: str
    topology: EpTopology
    num_redundant_experts: int
    settings: LiveSettings

    def key(self, trace_digest: str, costs: CostModel) -> str:
        """Equal keys mean equal results."""
        content = [self.kind, asdict(self.topology), asdict(self.settings), asdict(costs), trace_digest]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def make_grid(
    num_logical_experts: int,
    num_ranks: int,
    num_nodes: int,
    *,
    algorithms: Sequence[str],
    redundancies: Sequence[int],
    intervals: Sequence[int],
    dispatches: Sequence[str],
    base: LiveSettings,
) -> list[Candidate]:
    """Every combination, with DeepSeek's on a timer, nothing, an oracle and a load even by decree beside them.

    Raises:
        ConfigError: slots that do not divide over the ranks; the message names the nearest count that does.
    """
    rows = []
    for redundant in redundancies:
        topology = EpTopology.for_experts(num_logical_experts, redundant, num_ranks, num_nodes)
        rows.append(Candidate("nothing", topology, redundant, replace(base, algorithm=None, interval=intervals[0])))
        for dispatch in dispatches if redundant else dispatches[:1]:  # without replicas there is nothing to split
            for interval in intervals:
                settings = replace(base, interval=interval, dispatch=dispatch)  # type: ignore[arg-type]
                rows += [
                    Candidate("live", topology, redundant, replace(settings, algorithm=name)) for name in algorithms
                ]
                if dispatch == dispatches[0]:
                    # Stock engines share replicas alike and carry out whatever is planned.
                    timer = replace(settings, algorithm="deepseek", forced=True, dispatch="even")
                    rows.append(Candidate(TIMER, topology, redundant, timer))
        fixed = "weights" if "weights" in dispatches else dispatches[0]
        shortest = replace(base, interval=min(intervals), dispatch=fixed)  # type: ignore[arg-type]
        rows.append(Candidate("oracle", topology, redundant, shortest))
        rows.append(Candidate("force-balanced", topology, redundant, shortest))
    return rows


def without_slow_rows(candidates: Sequence[Candidate], algorithm: str) -> list[Candidate]:
    """Leaves out ``batch`` dispatch but for one algorithm: each step is solved, which is slow to score."""
    return [
        one
        for one in candidates
        if one.kind != "live" or one.settings.dispatch != "batch" or one.settings.algorithm == algorithm
    ]


def default_redundancies(num_logical_experts: int, num_ranks: int, most: int | None = None) -> list[int]:
    """None, one and two redundant slots a rank, or the nearest numbers that the ranks divide."""
    first = -num_logical_experts % num_ranks
    limit = 2 * num_ranks + first if most is None else most
    found = list(range(first, limit + 1, num_ranks))[:3]
    if not found:
        raise ConfigError(
            f"max_redundant_experts must be at least {first} for {num_logical_experts} experts on {num_ranks} ranks, "
            f"got {most}",
            field="max_redundant_experts",
        )
    return found


def default_intervals(num_steps: int) -> list[int]:
    """Three powers of two that let a trace of this length see a few rebalances."""
    longest = max(1, num_steps // 4)
    largest = 1 << (longest.bit_length() - 1)
    return sorted({max(1, largest >> shift) for shift in (0, 1, 2)})


def trace_digest(trace: LoadTrace) -> str:
    """A hash of what a trace counts."""
    state = hashlib.blake2b(repr(trace.logical_count.shape).encode())
    for step in trace.logical_count:
        state.update(np.ascontiguousarray(step).data)
    return state.hexdigest()


def play(candidate: Candidate, trace: LoadTrace, costs: CostModel) -> dict[str, Any]:
    """Plays one row; JSON values.

    Raises:
        EquipoiseError: the algorithm cannot plan there, or failed.
    """
    settings = candidate.settings
    if candidate.kind == "oracle":
        result = oracle(
            trace, candidate.topology, costs,
            interval=settings.interval, dispatch=settings.dispatch, policy=settings.policy(costs),
            num_groups=settings.num_groups,
        )  # fmt: skip
    elif candidate.kind == "force-balanced":
        result = forced_even(trace, candidate.topology, costs)
    else:
        result = replay_live(trace, candidate.topology, settings, costs)
    return {
        **result.to_dict(),
        "kind": candidate.kind,
        "algorithm": settings.algorithm if candidate.kind == "live" else None,
        "num_redundant_experts": candidate.num_redundant_experts,
        "num_migrations": result.num_migrations,
    }


@dataclass(frozen=True)
class Played:
    """A row, or why there is none."""

    candidate: Candidate
    row: dict[str, Any] | None
    left_out: str | None = None
