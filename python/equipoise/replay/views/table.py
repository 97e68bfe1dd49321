"""A comparison as a table that fits 80 columns, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from equipoise.replay.grid import BASELINES, TIMER, Played
from equipoise.replay.report import human_bytes

FORMAT = "equipoise.compare"
VERSION = 1
MAX_ROWS = 16


def ranked(played: Sequence[Played]) -> list[dict[str, Any]]:
    """Rows by tokens a second, best first; baselines of the redundancy that the best row has behind them."""
    rows = [entry.row for entry in played if entry.row is not None]
    live = sorted((row for row in rows if row["kind"] not in BASELINES), key=lambda row: -row["tokens_per_second"])
    redundant = live[0]["num_redundant_experts"] if live else rows[0]["num_redundant_experts"]
    base = {row["kind"]: row for row in rows if row["kind"] in BASELINES and row["num_redundant_experts"] == redundant}
    return live + [base[name] for name in BASELINES if name in base]


def nothing_of(played: Sequence[Played]) -> dict[str, Any]:
    """The row without any balancing that is best: what there is today without redundant experts."""
    rows = [entry.row for entry in played if entry.row is not None and entry.row["kind"] == "nothing"]
    return min(rows, key=lambda row: row["num_redundant_experts"])


def comparison_table(played: Sequence[Played], title: str) -> Table:
    """The best rows and the baselines."""
    rows = ranked(played)
    live = [row for row in rows if row["kind"] not in BASELINES]
    shown = live[:MAX_ROWS]
    timers = [row for row in live[MAX_ROWS:] if row["kind"] == TIMER][:1]
    base = nothing_of(played)["tokens_per_second"]
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("placement", overflow="fold", max_width=18)
    for name in ("dispatch", "R", "every", "balance", "lost", "moved", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in shown + timers:
        table.add_row(*_cells(row, base))
    table.add_section()
    for row in rows:
        if row["kind"] in BASELINES:
            table.add_row(*_cells(row, base))
    if len(live) > len(shown) + len(timers):
        table.caption = f"{len(live) - len(shown) - len(timers)} rows below these are in the JSON and the report"
        table.caption_justify = "left"
    return table


def label_of(row: dict[str, Any]) -> str:
    return str({"nothing": "nothing moved", "live": row["name"]}.get(row["kind"], row["kind"])).replace(
        TIMER, "deepseek, timer"
    )


def _cells(row: dict[str, Any], base: float) -> list[str]:
    gain = row["tokens_per_second"] / base - 1
    return [
        label_of(row),
        "-" if row["kind"] == "force-balanced" or not row["num_redundant_experts"] else row["dispatch"],
        str(row["num_redundant_experts"]),
        "-" if row["kind"] in ("nothing", "force-balanced") else str(row["interval"]),
        f"{row['mean_balancedness']:.3f}",
        f"{row['lost_to_imbalance_seconds'] / row['seconds']:.1%}",
        human_bytes(row["bytes_moved"]) if row["kind"] in ("live", TIMER) else "-",
        f"{gain:+.1%}" if gain else f"{row['tokens_per_second']:,.0f}",
    ]


def legend_text(played: Sequence[Played]) -> str:
    """What the words of the table mean."""
    lines = [
        "R: redundant experts a layer. every: steps between two rebalances. balance: mean / largest rank load, mean "
        "over steps and layers. lost: part of all time that ranks wait for the slowest in expert layers. tokens/s: "
        "against nothing moved with the fewest redundant experts, whose own figure is given; commits that hold up a "
        "step are in.",
        "oracle: plans made from the very steps they are scored on, and moving is free. force-balanced: every rank has "
        "the mean load. Times are of a roofline model, see docs/offline.md; only their ratios are of use.",
    ]
    left_out = list(
        dict.fromkeys(f"{entry.candidate.settings.algorithm}: {entry.left_out}" for entry in played if entry.left_out)
    )
    lines += [f"left out: {reason}" for reason in left_out]
    return "\n".join(lines)


def comparison_json(played: Sequence[Played], **about: Any) -> dict[str, Any]:
    """Everything, as JSON values."""
    return {
        "format": FORMAT,
        "version": VERSION,
        **about,
        "rows": ranked(played),
        "left_out": [
            {"algorithm": entry.candidate.settings.algorithm, "reason": entry.left_out}
            for entry in played
            if entry.left_out
        ],
    }
