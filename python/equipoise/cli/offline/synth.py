"""``equipoise synth``: a trace with a known skew and a known way to change."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.console import Console

from equipoise.cli.offline.recordings import say_what
from equipoise.load.export import export_trace
from equipoise.load.synthetic import SyntheticLoad, synthetic_trace

if TYPE_CHECKING:
    from equipoise.cli.offline.recording_arguments import Synth


def run_synth(arguments: Synth, console: Console) -> int:
    """Makes a trace and writes it. Returns 0.

    Raises:
        InvalidInputError: a number out of its range, or an output that cannot be written.
    """
    every = arguments.shift_every
    load = SyntheticLoad(
        num_steps=arguments.num_steps,
        num_layers=arguments.num_layers,
        num_logical_experts=arguments.num_logical_experts,
        tokens_per_step=arguments.tokens_per_step,
        top_k=arguments.top_k,
        popularity=arguments.popularity,
        skew=arguments.skew,
        drift_steps=math.inf if arguments.drift_steps is None else arguments.drift_steps,
        shift_at=() if every is None else tuple(range(every, arguments.num_steps, every)) if every > 0 else (),
        alternate_every=arguments.alternate_every,
        burst_every=arguments.burst_every,
        seed=arguments.seed,
    )
    trace = synthetic_trace(load)
    say_what(trace, console)
    export_trace(trace, arguments.out)
    console.print(f"written: {arguments.out}", highlight=False, markup=False, soft_wrap=True)
    return 0
