"""Recordings named on the command line: opened, with a word on what was found."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from equipoise.cli.offline.options import Reading
from equipoise.errors import TraceError
from equipoise.load.trace import LoadTrace, open_traces

STDIN = Path("-")


@contextmanager
def files_of(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """The paths, with ``-`` as a file that holds what the standard input gave.

    Raises:
        TraceError: ``-`` named more than once, or nothing came.
    """
    if list(paths).count(STDIN) > 1:
        raise TraceError("`-` can be named once only", field="trace")
    if STDIN not in paths:
        yield list(paths)
        return
    with tempfile.TemporaryDirectory() as folder:
        received = Path(folder) / "stdin"
        with received.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        yield [received if path == STDIN else path for path in paths]


@contextmanager
def opened(paths: Sequence[Path], reading: Reading, console: Console) -> Iterator[list[LoadTrace]]:
    """The recordings that files hold, each said in a line with what was guessed, dropped or ignored."""
    with files_of(paths) as files:
        traces = open_traces(
            files,
            tokens_per_step=reading.tokens_per_step,
            num_logical_experts=reading.num_logical_experts,
            read_as=reading.read_as,
        )
        for trace in traces:
            say_what(trace, console)
        yield traces


def say_what(trace: LoadTrace, console: Console) -> None:
    """What a recording is, and its notes."""
    steps = f"{trace.num_steps} step" + ("" if trace.num_steps == 1 else "s")
    line = f"{trace.found or 'recording'}: {steps}, {trace.num_layers} layers of {trace.num_logical_experts} experts"
    console.print(line, highlight=False, markup=False)
    for note in trace.notes:
        console.print(f"  note: {note}", highlight=False, markup=False, style="yellow")
