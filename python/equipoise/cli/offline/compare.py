"""``equipoise compare``: a recording played through the live loop with every combination of options."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from equipoise.algorithms.registry import AUTO, available_algorithms, check_algorithm, find_algorithm
from equipoise.cli.offline.cluster import costs_of, num_ranks_of
from equipoise.cli.offline.options import Cluster
from equipoise.cli.offline.recordings import opened
from equipoise.errors import ConfigError
from equipoise.formats.atomic_file import write_whole
from equipoise.load.merge import merge_traces
from equipoise.load.trace import LoadTrace
from equipoise.replay.costs import CostModel
from equipoise.replay.grid import (
    Candidate,
    Played,
    default_intervals,
    default_redundancies,
    make_grid,
    without_slow_rows,
)
from equipoise.replay.live import LiveSettings
from equipoise.replay.pool import ResumeFile, play_all
from equipoise.replay.views.table import comparison_json, comparison_table, legend_text

if TYPE_CHECKING:
    from equipoise.cli.offline.balance_arguments import Compare


def run_compare(arguments: Compare, console: Console) -> int:
    """Plays, prints, writes. Returns 0.

    Raises:
        InvalidInputError: a recording, a flag or an output that cannot be used. Nothing long runs before that is known.
    """
    check_outputs(arguments.json, arguments.html, arguments.png, arguments.resume)
    for name in arguments.algorithm:
        check_algorithm(name)
    with opened(arguments.traces, arguments.reading, console) as traces:
        trace = merge_traces(traces)
        costs = costs_of(arguments.cluster, trace.num_logical_experts, console)
        candidates = _grid(arguments, trace)
        played = play_with_progress(candidates, trace, costs, arguments.jobs, arguments.resume, console)
        _refuse_missing(arguments.algorithm, played)
        names = [path.name for path in arguments.traces]
        write_outputs(arguments, trace, names, costs, played, console)
        if str(arguments.json) == "-":
            return 0
        console.print(comparison_table(played, f"{', '.join(names)} on {title_of(arguments.cluster)}"))
        console.print(legend_text(played), highlight=False, markup=False, style="dim")
    return 0


def title_of(cluster: Cluster) -> str:
    return f"{num_ranks_of(cluster)} {cluster.gpu} in {cluster.num_nodes} node" + ("s" if cluster.num_nodes > 1 else "")


def _grid(arguments: Compare, trace: LoadTrace) -> list[Candidate]:
    ranks = num_ranks_of(arguments.cluster)
    base = LiveSettings(
        None,
        planning_delay=arguments.planning_delay,
        layers_per_chunk=arguments.layers_per_chunk,
        num_groups=arguments.cluster.num_groups,
        dispatch_scope=arguments.dispatch_scope,
    )
    candidates = make_grid(
        trace.num_logical_experts,
        ranks,
        arguments.cluster.num_nodes,
        algorithms=arguments.algorithm or _different_algorithms(arguments.cluster.num_nodes),
        redundancies=arguments.num_redundant_experts or default_redundancies(trace.num_logical_experts, ranks),
        intervals=arguments.interval or default_intervals(trace.num_steps),
        dispatches=arguments.dispatch or ("even", "weights", "batch"),
        base=base,
    )
    return candidates if arguments.dispatch or arguments.algorithm else without_slow_rows(candidates, AUTO)


def _different_algorithms(num_nodes: int) -> list[str]:
    """All, without those that first choose a node where there is one: they plan as their plain form does."""
    return [name for name in available_algorithms() if num_nodes > 1 or not find_algorithm(name).by_nodes]


def _refuse_missing(asked: Sequence[str], played: Sequence[Played]) -> None:
    """An algorithm that was asked for by name must have played somewhere."""
    for name in asked:
        rows = [
            entry for entry in played if entry.candidate.kind == "live" and entry.candidate.settings.algorithm == name
        ]
        if rows and all(entry.row is None for entry in rows):
            raise ConfigError(f"algorithm {name}: {rows[0].left_out}", field="algorithm")


def play_with_progress(
    candidates: Sequence[Candidate],
    trace: LoadTrace,
    costs: CostModel,
    jobs: int | None,
    resume: Path | None,
    console: Console,
) -> list[Played]:
    """Plays rows under a progress bar, where there is a terminal."""
    columns = (TextColumn("replaying"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(candidates))
        return play_all(
            candidates, trace, costs, jobs=jobs, resume=ResumeFile(resume), on_row=lambda: progress.advance(task)
        )


def check_outputs(*paths: Path | None) -> None:
    """
    Raises:
        ConfigError: a file in a folder that is not there, or a folder in place of a file.
    """
    for path in paths:
        if path is not None and str(path) != "-" and (path.is_dir() or not path.parent.is_dir()):
            raise ConfigError(f"{path} must be a file in an existing directory")


def write_outputs(
    arguments: object,
    trace: LoadTrace,
    names: Sequence[str],
    costs: CostModel,
    played: Sequence[Played],
    console: Console,
    **more: object,
) -> None:
    """Writes what ``--json``, ``--html`` and ``--png`` ask for."""
    json_path, html, png = (getattr(arguments, name) for name in ("json", "html", "png"))
    cluster = arguments.cluster  # type: ignore[attr-defined]
    if json_path is not None:
        content = comparison_json(played, traces=list(names), cluster=asdict(cluster), costs=asdict(costs), **more)
        text = json.dumps(content, indent=1, allow_nan=False)
        if str(json_path) == "-":
            sys.stdout.write(text + "\n")
        else:
            with write_whole(json_path) as file:
                file.write(text.encode())
    if html is not None or png is not None:
        from equipoise.replay.views.report_data import report_data

        data = report_data(trace, played, costs, f"{', '.join(names)}", title_of(cluster))
        if html is not None:
            from equipoise.replay.views.html import render_html

            with write_whole(html) as file:
                file.write(render_html(data).encode())
        if png is not None:
            from equipoise.replay.views.picture import draw_picture

            draw_picture(data, png)
    for path in (json_path, html, png):
        if path is not None and str(path) != "-":
            console.print(f"written: {path}", highlight=False, markup=False, soft_wrap=True)
