"""What a trace says at a glance: skew, hottest experts, idle layers, drift, phases."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from equipoise.formats.numbers import exact_sum
from equipoise.formats.raw_trace import DECODE, PREFILL
from equipoise.load.trace import LoadTrace

_DRIFT_WINDOWS = 8


@dataclass(frozen=True, eq=False)
class TraceStatistics:
    """
    Attributes:
        assignments: token-expert pairs of a layer, the largest.
        max_over_mean: (L,) load of the hottest expert over the mean one; NaN for an idle layer.
        gini: (L,) 0 for even load, towards 1 for load on one expert; NaN for an idle layer.
        unused: (L,) experts without a token.
        hottest: (layer row, expert, share of its layer), hottest first.
        idle_layers: rows without a token.
        drift: (W - 1,) of consecutive windows: the part of the load that would have to change experts for the one to
            look like the other (total variation), mean over layers.
        phase_distance: the same between prefill and decode; None where phases are not known.
    """

    assignments: float
    max_over_mean: np.ndarray
    gini: np.ndarray
    unused: np.ndarray
    hottest: tuple[tuple[int, int, float], ...]
    idle_layers: tuple[int, ...]
    drift: np.ndarray
    phase_distance: float | None


def describe_load(trace: LoadTrace, *, num_hottest: int = 5) -> TraceStatistics:
    """Looks at a whole trace once."""
    total = trace.total().astype(np.float64)
    sums = total.sum(1)
    idle = sums == 0
    with np.errstate(invalid="ignore", divide="ignore"):
        share = total / sums[:, None]
    ordered = np.sort(total, axis=1)
    num_experts = total.shape[1]
    weights = 2 * np.arange(1, num_experts + 1) - num_experts - 1
    with np.errstate(invalid="ignore", divide="ignore"):
        gini = (ordered * weights).sum(1) / (num_experts * sums)
        peak = share.max(1) * num_experts
    flat = np.nan_to_num(share).ravel()
    top = np.argsort(-flat, kind="stable")[:num_hottest]
    hottest = tuple((int(i) // num_experts, int(i) % num_experts, float(flat[i])) for i in top if flat[i] > 0)
    return TraceStatistics(
        assignments=float(sums.max(initial=0.0)),
        max_over_mean=peak,
        gini=gini,
        unused=(total == 0).sum(1),
        hottest=hottest,
        idle_layers=tuple(np.flatnonzero(idle).tolist()),
        drift=_drift(trace),
        phase_distance=_phase_distance(trace),
    )


def _drift(trace: LoadTrace) -> np.ndarray:
    parts = np.array_split(np.arange(trace.num_steps), min(_DRIFT_WINDOWS, trace.num_steps))
    windows = [trace.total(slice(int(part[0]), int(part[-1]) + 1)) for part in parts if len(part)]
    return np.array([_distance(left, right) for left, right in pairwise(windows)])


def _phase_distance(trace: LoadTrace) -> float | None:
    if trace.phases is None:
        return None
    kinds = [trace.phases == PREFILL, trace.phases == DECODE]
    if not all(kind.any() for kind in kinds):
        return None
    return _distance(*(exact_sum(trace.logical_count[kind]) for kind in kinds))


def _distance(left: np.ndarray, right: np.ndarray) -> float:
    """Total variation of two loads (L, E), mean over the layers that both use."""
    sums = left.sum(1, dtype=np.float64), right.sum(1, dtype=np.float64)
    both = (sums[0] > 0) & (sums[1] > 0)
    if not both.any():
        return float("nan")
    a, b = left[both] / sums[0][both, None], right[both] / sums[1][both, None]
    return float(0.5 * np.abs(a - b).sum(1).mean())
