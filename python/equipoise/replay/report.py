"""A replay's table for people and its JSON for programs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from equipoise.errors import ConfigError
from equipoise.formats.atomic_file import write_whole
from equipoise.replay.config import ReplayConfig
from equipoise.replay.result import ReplayResult, score_summary

FORMAT = "equipoise.replay"
VERSION = 1


def to_table(results: Sequence[ReplayResult], title: str) -> Table:
    """One row per algorithm, between no rebalancing and the oracle. Its borders are Markdown, to paste as it is."""
    table = Table(box=box.MARKDOWN, title=Text(title), title_justify="left")
    table.add_column("placement", no_wrap=True)
    names = (
        "balancedness",
        "worst",
        "PAR",
        "gap closed",
        "slots changed",
        "moves",
        "cross-node",
        "bytes",
        "plan (max)",
    )
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    first = results[0]
    table.add_row(
        "no rebalancing",
        *_scores(first.no_rebalancing),
        "0%",
        "0",
        "0",
        "0",
        "-" if first.expert_bytes is None else "0 B",
        "-",
    )
    for result in results:
        table.add_row(
            result.policy,
            *_scores(result.balancedness),
            "-" if result.gap_closed is None else f"{result.gap_closed:.0%}",
            f"{result.slots_changed:,}",
            f"{result.moves:,}",
            f"{result.cross_node_moves:,}",
            "-" if result.bytes_moved is None else human_bytes(result.bytes_moved),
            f"{result.planning_seconds_median * 1e3:.1f} ({result.planning_seconds_max * 1e3:.1f}) ms",
        )
    if first.mean_oracle is not None:
        table.add_row("oracle", *_scores(first.oracle), "100%", *["-"] * 5)
    return table


def legend(results: Sequence[ReplayResult]) -> str:
    """What the table's words mean for these replays of the same windows."""
    result = results[0]
    windows, topology = result.windows, result.topology
    histories = sorted({each.history for each in results}, reverse=True)
    past = ", ".join(
        f"{_count(history, 'past window')} at most"
        + (f" ({', '.join(each.policy for each in results if each.history == history)})" if histories[1:] else "")
        for history in histories
    )
    _, num_layers, num_experts = windows.load.shape
    lines = [
        f"{_count(num_layers, 'layer')} of {_count(num_experts, 'expert')} in {topology.num_slots} slots on "
        f"{_count(topology.num_ranks, 'rank')} in {_count(topology.num_nodes, 'node')}; {len(windows)} windows of "
        f"{_count(windows.steps_per_window, 'step')}, {len(windows) - 1} scored; "
        f"{_count(len(result.plans), 'plan')}, each from {past}.",
        "balancedness: mean rank load / max rank load, mean over windows and layers with tokens; worst: of the worst "
        "window; PAR: the inverse, averaged likewise.",
        "slots changed, moves (the new expert was not on that rank), cross-node moves: sums over plans and layers.",
        "plan: median and longest time of one plan for all layers.",
        f"oracle: per window and layer the best plan of {', '.join(result.oracle_algorithms) or 'no algorithm'} made "
        "from that very window.",
    ]
    if windows.steps_left_out:
        lines.append(f"{_count(windows.steps_left_out, 'step')} behind the last full windows left out.")
    if windows.empty_windows:
        lines.append(f"{_count(windows.empty_windows, 'window')} without a token skipped.")
    return "\n".join(lines)


def to_json(results: Sequence[ReplayResult], config: ReplayConfig, trace_names: Sequence[str]) -> dict[str, Any]:
    """Everything in the table and the numbers of each window. None stands for "no token" and "not measured"."""
    first = results[0]
    windows, topology = first.windows, first.topology
    return {
        "format": FORMAT,
        "version": VERSION,
        "traces": list(trace_names),
        "config": asdict(config),
        "num_layers": windows.load.shape[1],
        "num_logical_experts": windows.load.shape[2],
        "topology": asdict(topology),
        "windows": [
            {
                "index": index,
                "trace": windows.trace_index[index],
                "first_step": windows.first_step[index],
                "assignments": int(windows.load[index].sum()),
            }
            for index in range(len(windows))
        ],
        "steps_left_out": windows.steps_left_out,
        "empty_windows_skipped": windows.empty_windows,
        "no_rebalancing": score_summary(first.no_rebalancing),
        "oracle": {"algorithms": list(first.oracle_algorithms), **score_summary(first.oracle)},
        "algorithms": [result.to_dict() for result in results],
    }


def write_json(content: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes the file whole or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        with write_whole(path) as file:
            file.write(json.dumps(content, indent=1, allow_nan=False).encode())
    except OSError as error:
        raise ConfigError(f"json {path}: cannot be written: {error.strerror}", field="json") from error


def human_bytes(count: float) -> str:
    """Formats a number of bytes in binary units, e.g. ``1.5 MiB``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _scores(balancedness: np.ndarray) -> tuple[str, str, str]:
    summary = score_summary(balancedness)
    worst = min(value for value in summary["balancedness_per_window"] if value is not None)
    return f"{summary['mean_balancedness']:.4f}", f"{worst:.4f}", f"{summary['mean_peak_to_average']:.3f}"
