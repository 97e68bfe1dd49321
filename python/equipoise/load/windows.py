"""Recorded steps cut into load windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from equipoise.errors import TraceError
from equipoise.load.trace import LoadTrace


@dataclass(frozen=True, eq=False)
class Windows:
    """Load windows in the order of play.

    Attributes:
        load: (W, L, E) int64, tokens per expert, summed over the steps of a window.
        trace_index: which of the traces each window comes from.
        first_step: index in its trace of each window's first step.
        steps_per_window: how many steps a window sums.
        steps_left_out: steps behind the last full window of each trace.
        empty_windows: windows without a token; they are neither history nor scored.
    """

    load: np.ndarray
    trace_index: tuple[int, ...]
    first_step: tuple[int, ...]
    steps_per_window: int
    steps_left_out: int
    empty_windows: int

    def __len__(self) -> int:
        return self.load.shape[0]


def cut_windows(traces: Sequence[LoadTrace], steps_per_window: int) -> Windows:
    """Cuts each trace into windows of ``steps_per_window`` steps, one trace after the other.

    A window never mixes two traces. What is left behind a trace's last full window is left out: a few steps show more
    noise than imbalance, and would weigh as much as a full window.

    Raises:
        TraceError: traces of different models, or fewer than two windows (one to plan on, one to score).
    """
    if not traces:
        raise TraceError("replay needs at least one trace", field="trace")
    shape = (traces[0].num_layers, traces[0].num_logical_experts)
    load, trace_index, first_step = [], [], []
    left_out = empty = 0
    for index, trace in enumerate(traces):
        found = (trace.num_layers, trace.num_logical_experts)
        if found != shape:
            raise TraceError(
                f"traces are of different models: trace 0 has (layers, experts) = {shape}, trace {index} has {found}",
                field="trace",
            )
        left_out += trace.num_steps % steps_per_window
        for start in range(0, trace.num_steps - steps_per_window + 1, steps_per_window):
            window = trace.total(slice(start, start + steps_per_window))
            if not window.any():
                empty += 1
                continue
            load.append(window)
            trace_index.append(index)
            first_step.append(start)
    if len(load) < 2:
        steps = [trace.num_steps for trace in traces]
        raise TraceError(
            f"replay needs at least two windows with tokens, one to plan on and one to score; "
            f"window={steps_per_window} steps gives {len(load)} from traces of {steps} steps",
            field="window",
        )
    stacked = np.stack(load)
    stacked.flags.writeable = False  # a policy gets views of it
    return Windows(stacked, tuple(trace_index), tuple(first_step), steps_per_window, left_out, empty)
