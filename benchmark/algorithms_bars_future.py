"""Bars and tables of algorithms_future.py."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


class Bars:
    """Prints each bar as it is measured, and keeps it for the JSON file."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.rows: dict[str, dict[str, Any]] = {}

    def at_least(self, name: str, measured: float, wanted: float, where: str = "") -> None:
        self._bar(name, measured, wanted, "at least", measured >= wanted, where)

    def at_most(self, name: str, measured: float, wanted: float, where: str = "") -> None:
        self._bar(name, measured, wanted, "at most", measured <= wanted, where)

    def _bar(self, name: str, measured: float, wanted: float, sign: str, met: bool, where: str) -> None:
        self.rows[name] = {
            "measured": float(measured),
            "wanted": f"{sign} {wanted:g}",
            "met": bool(met),
            "where": where,
        }
        word = "[green]pass[/]" if met else "[red]MISS[/]"
        self.console.print(f"{word} {name}: {measured:.4f} ({sign} {wanted:g}) {where}")


def show_table(console: Console, title: str, rows: dict[str, dict[str, float]]) -> None:
    """Prints a row for each entry; columns are the keys of all rows."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    table = Table("", *columns, title=title)
    for name, row in rows.items():
        table.add_row(name, *(f"{row[column]:.3f}" if column in row else "" for column in columns))
    console.print(table)
