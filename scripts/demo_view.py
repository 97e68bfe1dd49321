"""What the demo shows: the heat of every rank while it runs, and the tables at its end."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from demo_dispatch import DispatchGain


def command_text(command: list[str], width: int) -> Text:
    """A command over as many lines as it takes, broken between arguments, to be copied as it stands."""
    words = [command[0]]
    for word in command[1:]:
        # A value stays on the line of its flag.
        if words[-1].startswith("--") and " " not in words[-1] and not word.startswith("--"):
            words[-1] += f" {word}"
        else:
            words.append(word)
    lines = [f"$ {words[0]}"]
    for word in words[1:]:
        if len(lines[-1]) + len(word) + 3 > width:
            lines[-1] += " \\"
            lines.append(f"    {word}")
        else:
            lines[-1] += f" {word}"
    return Text("\n".join(lines), style="bold")


def heat_style(relative: float) -> str:
    if relative > 1.5:
        return "bold white on red"
    if relative > 1.2:
        return "black on yellow"
    return "black on green" if relative > 0.8 else "white on blue"


def rank_heat(status: dict[str, Any]) -> Table:
    """Load of each rank over the mean of its layer, and the balancedness that follows."""
    table = Table(title="load of each rank, 1.0 = its fair share (recent steps)", title_justify="left")
    table.add_column("layer", justify="right")
    for rank in range(status["num_ranks"]):
        table.add_column(f"rank {rank}", justify="center")
    table.add_column("balancedness", justify="right")
    for layer, loads in enumerate(status["rank_load"]):
        row = np.array(loads)
        cells = [Text(f"{x:5.2f} ", style=heat_style(x)) for x in row / max(row.mean(), 1e-9)]
        value = status["balancedness"][layer]
        table.add_row(str(layer), *cells, "-" if value is None else f"{value:.3f}")
    return table


def scene(title: str, words: str, status: dict[str, Any] | None, sample: str, num_answers: int) -> Panel:
    """One screen: what is happening in words, the heat, and a line of what the model is writing."""
    parts: list[Any] = [Text(words), Text("")]
    if status is not None and status["rank_load"]:
        mean = status["mean_balancedness"]
        parts += [
            rank_heat(status),
            Text(f"mean balancedness {mean:.3f}: the busiest rank has {1 / mean:.2f} times its share", style="bold"),
        ]
    line = sample.replace("\n", "⏎")[:100]
    parts += [
        Text(""),
        Text(f"{num_answers} answers so far; now: {line}", style="dim", overflow="ellipsis", no_wrap=True),
    ]
    return Panel(Group(*parts), title=title, title_align="left")


def layer_table(before: dict[str, Any], after: dict[str, Any], report: dict[str, Any]) -> Table:
    """Measured balancedness before and after, slots changed and moved, per layer and in all."""
    table = Table(title="one rebalance, layer by layer", title_justify="left")
    for name in ("layer", "before", "after", "slots changed", "over a wire", "to another node"):
        table.add_column(name, justify="right")
    columns = (before["balancedness"], after["balancedness"])
    for layer in range(before["num_layers"]):
        values = ["-" if column[layer] is None else f"{column[layer]:.3f}" for column in columns]
        counts = [str(report[name][layer]) for name in ("slots_changed", "moves", "cross_node_moves")]
        table.add_row(str(layer), *values, *counts)
    means = [f"{status['mean_balancedness']:.3f}" for status in (before, after)]
    slots = before["num_layers"] * before["num_physical_experts"]
    totals = [str(sum(report[name])) for name in ("slots_changed", "moves", "cross_node_moves")]
    table.add_section()
    table.add_row("all", *means, f"{totals[0]} of {slots}", *totals[1:], style="bold")
    return table


def step_table(steps: dict[str, list[float]]) -> Table:
    """p50 and p99 of step times, in milliseconds."""
    table = Table(title="time of a forward pass, balancing included", title_justify="left")
    for name in ("", "steps", "p50 ms", "p99 ms", "longest ms"):
        table.add_column(name, justify="right")
    for name, seconds in steps.items():
        values = [f"{1e3 * np.percentile(seconds, q):.1f}" for q in (50, 99, 100)] if seconds else ["-"] * 3
        table.add_row(name, str(len(seconds)), *values)
    return table


def last_screen(story: Any, gain: DispatchGain, num_right: int, num_answers: int, seconds: float) -> Panel:
    """The story in numbers, and where to look next."""
    report, steps = story.report, story.steps
    balance = [status["mean_balancedness"] for status in (story.fitted, story.before, story.after)]
    p50, p99 = ({act: 1e3 * np.percentile(s, q) for act, s in steps.items() if s} for q in (50, 99))
    table = Table.grid(padding=(0, 2))
    table.add_row("balancedness", f"{balance[0]:.3f} on prose -> {balance[1]:.3f} after the shift to code")
    table.add_row("", f"-> [bold]{balance[2]:.3f}[/] after one rebalance while requests streamed")
    table.add_row("step by step", gain.text)
    table.add_row("", gain.moving_text)
    moved = f"{sum(report['slots_changed'])} slots changed, {report['bytes_moved'] / 1e6:.2f} MB over a wire"
    table.add_row("price", f"{moved}, {1e3 * report['planning_seconds']:.1f} ms of planning beside the steps")
    times = ", ".join(f"{p50[act]:.0f} ({p99[act]:.0f}) {act}" for act in steps if act in p50)
    table.add_row("step time", f"p50 (p99) in ms: {times}")
    style = "bold green" if num_right == num_answers else "bold red"
    table.add_row("proof", f"[{style}]{num_right} of {num_answers}[/] greedy answers equal plain transformers'")
    table.add_row("", "")
    table.add_row("next", "`make demo ARGS=--keep-running` leaves the server up")
    table.add_row("", "README.md: serve your own model, replay your own load")
    table.add_row("", "examples/: scripts to copy")
    return Panel(table, title=f"Equipoise in {seconds:.0f} s", title_align="left")
