"""What a report shows: the comparison, and the recommended and present placement rank by rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from equipoise.load.trace import LoadTrace
from equipoise.placement.balancedness import rank_load
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.replay.costs import CostModel
from equipoise.replay.grid import TIMER, Played
from equipoise.replay.live import replay_live
from equipoise.replay.views.advice import Advice, advise
from equipoise.replay.views.table import label_of, ranked

MAX_POINTS = 240


@dataclass(frozen=True, eq=False)
class ReportData:
    """
    Attributes:
        heat_before, heat_after: (L, G) load of each rank over the mean one of its layer; NaN for idle layers. After:
            the last quarter of the trace, on the placement that the replay ended with.
        curves: (label, balancedness of each step, mean over layers).
        points: (label, bytes moved, balancedness) of every row that moves anything.
    """

    traces: str
    cluster: str
    shape: str
    advice: Advice
    rows: list[dict[str, Any]]
    heat_before: np.ndarray
    heat_after: np.ndarray
    layer_ids: np.ndarray
    curves: list[tuple[str, list[float]]]
    points: list[tuple[str, float, float]]
    left_out: tuple[str, ...]
    chosen_label: str


def report_data(trace: LoadTrace, played: Sequence[Played], costs: CostModel, traces: str, cluster: str) -> ReportData:
    """Plays the recommended row once more, for the placement that it ends with."""
    rows = ranked(played)
    found = advise(played, rows[0]["topology"]["num_ranks"])
    live = [row for row in rows if row["kind"] == "live"] or [row for row in rows if row["kind"] == TIMER]
    chosen_row = found.row or max(live, key=lambda row: row["mean_balancedness"])
    word = "recommended" if found.row is not None else "most even"
    chosen = next(entry.candidate for entry in played if entry.row is chosen_row)
    last = trace.total(slice(3 * trace.num_steps // 4, None))
    after = replay_live(trace, chosen.topology, chosen.settings, costs).final_placement
    before = ExpertLocationMetadata.trivial(trace.num_layers, trace.num_logical_experts, chosen.topology)
    assert after is not None
    kinds = {row["kind"]: row for row in rows}
    shown = [("nothing moved", kinds.get("nothing")), ("deepseek, timer", _best_timer(rows)),
             (f"{label_of(chosen_row)}, {word}", chosen_row), ("oracle", kinds.get("oracle"))]  # fmt: skip
    return ReportData(
        traces=traces,
        cluster=cluster,
        shape=f"{trace.num_steps} steps, {trace.num_layers} layers of {trace.num_logical_experts} experts",
        advice=found,
        rows=rows,
        heat_before=_over_mean(last, before),
        heat_after=_over_mean(last, after),
        layer_ids=trace.layer_ids,
        curves=[(label, _thinned(row["balancedness_per_step"])) for label, row in shown if row is not None],
        points=[
            (f"{label_of(row)}, R {row['num_redundant_experts']}, every {row['interval']}, {row['dispatch']}",
             row["bytes_moved"], row["mean_balancedness"])
            for row in rows if row["kind"] in ("live", TIMER)
        ],
        left_out=tuple({f"{e.candidate.settings.algorithm}: {e.left_out}": None for e in played if e.left_out}),
        chosen_label="as recommended" if found.row is not None else "with the most even placement",
    )  # fmt: skip


def _best_timer(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    return max((r for r in rows if r["kind"] == TIMER), key=lambda r: r["tokens_per_second"], default=None)


def _over_mean(load: np.ndarray, placement: ExpertLocationMetadata) -> np.ndarray:
    per_rank = rank_load(load.astype(np.float64), placement)
    with np.errstate(invalid="ignore", divide="ignore"):
        return per_rank / per_rank.mean(1, keepdims=True)


def _thinned(values: Sequence[float]) -> list[float]:
    """At most MAX_POINTS values, each the mean of a stretch."""
    if len(values) <= MAX_POINTS:
        return list(values)
    return [float(part.mean()) for part in np.array_split(np.array(values), MAX_POINTS)]
