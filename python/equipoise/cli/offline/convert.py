"""``equipoise convert``, ``merge`` and ``thin``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from equipoise.cli.offline.options import Reading
from equipoise.cli.offline.recordings import opened
from equipoise.errors import ConfigError
from equipoise.load.export import export_trace
from equipoise.load.merge import merge_traces, thin_trace
from equipoise.load.trace import LoadTrace


def run_convert(inputs: Sequence[Path], output: Path, reading: Reading, console: Console) -> int:
    """Reads recordings and writes them as one trace. Returns 0.

    Raises:
        InvalidInputError: a recording that cannot be read, or an output that cannot be written.
    """
    with opened(inputs, reading, console) as traces:
        _write(merge_traces(traces), output, console)
    return 0


def run_thin(path: Path, output: Path, reading: Reading, every: int, keep: slice, console: Console) -> int:
    """Keeps a stretch of steps and sums every few of them. Returns 0.

    Raises:
        InvalidInputError: as :func:`run_convert`, or a stretch without a step.
    """
    with opened([path], reading, console) as traces:
        trace = merge_traces(traces)
        kept = trace.take(keep) if keep != slice(0, None) else trace
        if not kept.num_steps:
            raise ConfigError(
                f"first {keep.start} and last {keep.stop} keep none of {trace.num_steps} steps", field="first"
            )
        _write(thin_trace(kept, every), output, console)
    return 0


def _write(trace: LoadTrace, output: Path, console: Console) -> None:
    export_trace(trace, output)
    size = output.stat().st_size
    console.print(
        f"written: {output} ({trace.num_steps} steps, {size:,} bytes)", highlight=False, markup=False, soft_wrap=True
    )
