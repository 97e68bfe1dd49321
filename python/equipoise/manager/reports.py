"""What a rebalance decided, did and cost: plain frozen values that cross processes, and their words for a log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from equipoise.transfer.execution.profile import LayerProfile

Phase = Literal["collecting", "planning", "migrating", "paused", "failed"]
Action = Literal["skip", "reweight", "migrate"]
Outcome = Literal["skipped", "dry_run", "committed", "cancelled", "failed"]
OptionalFloats = list[float | None]


@dataclass(frozen=True)
class BalanceSummary:
    """Balance over the layers that saw a token. PAR, peak to average ratio, is maximum / mean rank load of a layer."""

    mean: float  # balancedness, every layer alike
    load_weighted: float  # sum of mean rank loads / sum of maximum rank loads: busy layers weigh more
    worst: float  # balancedness of the worst layer
    worst_layer: int  # the host's number of it
    par_mean: float
    par_max: float
    par_min: float


def summarize_balance(rank_load: np.ndarray, layer_ids: Sequence[int]) -> BalanceSummary | None:
    """Summary of (L, G) tokens per rank; None if no layer saw a token."""
    seen = np.flatnonzero(rank_load.max(1) > 0)
    if not seen.size:
        return None
    mean, top = rank_load[seen].mean(1), rank_load[seen].max(1)
    balancedness, par = mean / top, top / mean
    worst = int(balancedness.argmin())
    return BalanceSummary(
        mean=float(balancedness.mean()),
        load_weighted=float(mean.sum() / top.sum()),
        worst=float(balancedness[worst]),
        worst_layer=int(layer_ids[seen[worst]]),
        par_mean=float(par.mean()),
        par_max=float(par.max()),
        par_min=float(par.min()),
    )


@dataclass(frozen=True)
class RebalanceProfile:
    """Where the time of a rebalance went, on rank 0."""

    gather_seconds: float  # load window, reduced over ranks
    plan_seconds: float  # the placement algorithm
    plan_transfer_seconds: float  # who sends what to whom
    wait_seconds: float  # from the start of planning until all ranks had the plan
    migrate_seconds: float  # from then until the last commit
    stall_seconds: float  # of all that, what stood between two forward passes
    peak_staging_bytes: int
    layers: list[LayerProfile]  # with the host's numbers of layers


@dataclass(frozen=True)
class RebalanceReport:
    """One rebalance. Lists over layers are in the order of ``layer_ids``; None where a layer saw no token."""

    outcome: Outcome
    action: Action
    reason: str
    algorithm: str
    forward_pass_id: int  # the step after which it ended
    window_steps: int
    layer_ids: list[int]  # the host's numbers of the MoE layers
    balancedness_before: list[float | None]
    balancedness_after: list[float | None]  # of the same window on the new placement; as before if nothing changes
    mean_balancedness_before: float | None
    mean_balancedness_after: float | None
    balance_before: BalanceSummary | None  # None if no layer saw a token
    balance_after: BalanceSummary | None
    slots_changed: list[int]
    moves: list[int]
    cross_node_moves: list[int]
    bytes_sent_per_rank: list[int]  # over the wire, canaries included; of a failed one, for the layers that committed
    bytes_received_per_rank: list[int]
    bytes_sent_per_node: list[int]  # to another node
    bytes_received_per_node: list[int]  # from another node
    planning_seconds: float  # overlapped with the forward passes
    transfer_seconds: float  # from the plan's arrival to the last commit
    stall_seconds: float  # time that forward passes waited for this rebalance, in all
    profile: RebalanceProfile
    error: str | None = None

    @property
    def bytes_moved(self) -> int:
        return sum(self.bytes_received_per_rank)


@dataclass(frozen=True)
class RebalanceTotals:
    """Sums over every rebalance that has ended since start, requested or not: they never fall."""

    by_outcome: dict[Outcome, int] = field(default_factory=lambda: dict.fromkeys(get_args(Outcome), 0))
    moves: int = 0  # of committed rebalances
    cross_node_moves: int = 0
    moved_bytes: int = 0  # for all layers that committed, those of rebalances that failed later included
    stall_seconds: float = 0.0

    def plus(self, report: RebalanceReport) -> RebalanceTotals:
        """These totals with one more rebalance."""
        committed = report.outcome == "committed"
        return RebalanceTotals(
            by_outcome={**self.by_outcome, report.outcome: self.by_outcome[report.outcome] + 1},
            moves=self.moves + committed * sum(report.moves),
            cross_node_moves=self.cross_node_moves + committed * sum(report.cross_node_moves),
            moved_bytes=self.moved_bytes + report.bytes_moved,
            stall_seconds=self.stall_seconds + report.stall_seconds,
        )


def describe(report: RebalanceReport, *, profile: bool) -> str:
    """One line; with ``profile`` a table under it."""
    line = f"rebalance after step {report.forward_pass_id}: {report.outcome}: {report.error or report.reason}"
    if report.outcome == "committed":
        line += (
            f"; {sum(report.moves)} experts moved, {report.bytes_moved / 1e6:.2f} MB over a wire, "
            f"steps waited {1e3 * report.stall_seconds:.1f} ms"
        )
    if report.balance_before is not None and report.balance_after is not None and report.outcome != "failed":
        line += f"; {_balance_words(report)}"
    return "\n".join([line, *_profile_lines(report)]) if profile else line


def _balance_words(report: RebalanceReport) -> str:
    words = []
    for name, balance in (("before", report.balance_before), ("after", report.balance_after)):
        if balance is not None and (name == "before" or balance != report.balance_before):
            words.append(
                f"{name}: worst layer {balance.worst_layer} at {balance.worst:.3f}, "
                f"all tokens {balance.load_weighted:.3f}, "
                f"PAR {balance.par_mean:.3f} ({balance.par_min:.3f} to {balance.par_max:.3f})"
            )
    return ", ".join(words)


def _profile_lines(report: RebalanceReport) -> list[str]:
    times = report.profile
    planning = times.plan_seconds + times.plan_transfer_seconds
    rows = [
        ("load gathered from all ranks", times.gather_seconds),
        ("placement planned", times.plan_seconds),
        ("transfer planned", times.plan_transfer_seconds),
        ("plan broadcast, and waited for a step", max(0.0, times.wait_seconds - times.gather_seconds - planning)),
        ("migrated, first start to last commit", times.migrate_seconds),
        ("  transfers", sum(layer.transfer_seconds for layer in times.layers)),
        ("  checks and votes", sum(layer.verify_seconds for layer in times.layers)),
        ("  commits", sum(layer.commit_seconds or 0.0 for layer in times.layers)),
        ("steps waited, in all", times.stall_seconds),
    ]
    lines = [f"  {name:<40s}{1e3 * seconds:10.2f} ms" for name, seconds in rows]
    lines.append(f"  {'staging, at most':<40s}{times.peak_staging_bytes:10,d} bytes a rank")
    if times.layers:
        lines.append("  layer  rounds      bytes in  transfer ms  verify ms  commit ms")
    for layer in times.layers:
        counts = f"  {layer.layer_id:5d}  {layer.num_rounds:6d}  {layer.bytes_received:12,d}"
        counts += f"  {1e3 * layer.transfer_seconds:11.2f}  {1e3 * layer.verify_seconds:9.2f}"
        commit = "-" if layer.commit_seconds is None else f"{1e3 * layer.commit_seconds:.2f}"
        lines.append(f"{counts}  {commit:>9s}")
    return lines


def as_optional_floats(values: np.ndarray) -> OptionalFloats:
    """NaN, which JSON has not, becomes None."""
    return [None if np.isnan(value) else float(value) for value in values]


def mean_of(values: OptionalFloats) -> float | None:
    """Average over the layers that have a value."""
    seen = [value for value in values if value is not None]
    return float(np.mean(seen)) if seen else None
