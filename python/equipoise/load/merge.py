"""Traces put together, thinned, and cut."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from equipoise.errors import ConfigError, TraceError
from equipoise.formats.numbers import exact_sum
from equipoise.load.trace import LoadTrace


def merge_traces(traces: Sequence[LoadTrace]) -> LoadTrace:
    """One trace of several of one model, their steps one after the other.

    What only some of them know (tokens, source ranks, slots) is left behind; steps are numbered anew.

    Raises:
        TraceError: none, or of different shape.
    """
    if not traces:
        raise TraceError("nothing to merge")
    if len(traces) == 1:
        return traces[0]
    shapes = {(trace.num_layers, trace.num_logical_experts) for trace in traces}
    if len(shapes) > 1:
        raise TraceError(f"traces are of different models: (layers, experts) = {sorted(shapes)}", field="trace")
    phases = [trace.phases for trace in traces]
    times = [trace.timestamps for trace in traces]
    return LoadTrace(
        np.concatenate([trace.logical_count for trace in traces]),
        metadata={"source": "merged", "merged": [dict(trace.metadata, steps=trace.num_steps) for trace in traces]},
        layer_ids=traces[0].layer_ids,
        phases=None if any(p is None for p in phases) else np.concatenate(phases),  # type: ignore[arg-type]
        timestamps=None if any(t is None for t in times) else np.concatenate(times),  # type: ignore[arg-type]
    )


def thin_trace(trace: LoadTrace, num_steps: int) -> LoadTrace:
    """Sums every ``num_steps`` consecutive steps to one; the last may be of fewer.

    Raises:
        ConfigError: ``num_steps`` below 1.
    """
    if num_steps < 1:
        raise ConfigError(f"sum must be at least 1, got {num_steps}", field="sum")
    if num_steps == 1:
        return trace
    starts = np.arange(0, trace.num_steps, num_steps)
    parts = [slice(int(start), int(start) + num_steps) for start in starts]
    ranks = trace.rank_count
    return LoadTrace(
        np.stack([exact_sum(trace.logical_count[part]) for part in parts]),
        trace.forward_pass_ids[starts],
        physical_to_logical_map=trace.physical_to_logical_map,
        metadata={**trace.metadata, "steps_summed": num_steps},
        layer_ids=trace.layer_ids,
        timestamps=None if trace.timestamps is None else trace.timestamps[starts],
        rank_count=None if ranks is None else np.stack([exact_sum(ranks[part]) for part in parts]),
    )
