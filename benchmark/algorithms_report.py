"""The comparison of algorithms as tables."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from algorithms_workloads import KINDS


def show(report: dict[str, Any], console: Console) -> None:
    runs = report["next_window"]
    names = [name for name in next(iter(runs.values())) if name != "kind"]
    for kind, title in KINDS.items():
        rows = [row for row in runs.values() if row["kind"] == kind]
        if not rows:
            continue
        table = Table(
            "policy",
            "balancedness",
            "moves",
            "cross-node",
            title=f"Next window, {title}: mean of {len(rows)} sequences",
        )
        for name in names:
            mean = {key: np.mean([row[name][key] for row in rows]) for key in rows[0][name]}
            table.add_row(
                name, f"{mean['balancedness']:.3f}", f"{mean['moves']:.1%}", f"{mean['cross_node_moves']:.1%}"
            )
        console.print(table)
    columns = list(next(iter(report["same_window"].values())))
    table = Table("configuration", *columns, title="Same window: balancedness")
    for name, row in report["same_window"].items():
        cells = ["" if row.get(c) is None else str(row[c]) if c == "twins" else f"{row[c]:.3f}" for c in columns]
        table.add_row(name, *cells)
    console.print(table)
    table = Table("what", "value", title="Planning: seconds (58x256 -> 288/32/4, one thread, CPU, unless named)")
    for name, value in report["seconds"].items():
        table.add_row(name, f"{value:.3f}")
    console.print(table)
    table = Table("bar", "measured", "wanted", "met", title="Bars")
    for name, row in report["bars"].items():
        table.add_row(name, f"{row['measured']:.4g}", row["wanted"], "yes" if row["met"] else "[red]no[/]")
    console.print(table)
