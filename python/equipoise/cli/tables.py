"""Prints tables and paragraphs so that they fit the terminal: no number loses its end, no word is cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def print_table(table: Table, console: Console) -> None:
    """Prints a table; on a terminal that is too narrow, as several below each other that repeat the first column.

    Where the output is no terminal, lines are as long as they need to be: a program or a paste takes the whole table.
    """
    width = console.width
    parts = list(split_columns(table, console, width)) if console.is_terminal else [table]
    try:
        for part in parts:
            console.width = max(width, natural_width(part, console))
            console.print(part, crop=False)
    finally:
        console.width = width


def print_paragraphs(text: str, console: Console) -> None:
    """Prints lines of prose, on a terminal broken at words."""
    console.print(text, highlight=False, markup=False, soft_wrap=not console.is_terminal)


def natural_width(table: Table, console: Console) -> int:
    """Characters that a table takes where there is room for all of it."""
    return Measurement.get(console, console.options.update(width=10_000), table).maximum


def split_columns(table: Table, console: Console, width: int) -> Iterator[Table]:
    """The table, or tables with its first column and as many of the others as fit ``width``, at least one."""
    chosen: list[int] = []
    title = table.title
    for index in range(1, len(table.columns)):
        if chosen and natural_width(with_columns(table, [0, *chosen, index]), console) > width:
            yield with_columns(table, [0, *chosen], title=title)
            chosen, title = [], None
        chosen.append(index)
    yield with_columns(table, [0, *chosen], title=title)


def with_columns(table: Table, indices: Sequence[int], title: object = None) -> Table:
    """A table in the same style with some of its columns."""
    part = Table(box=table.box, title=title, title_justify=table.title_justify)  # type: ignore[arg-type]
    columns = [table.columns[index] for index in indices]
    for column in columns:
        part.add_column(column.header, justify=column.justify, no_wrap=column.no_wrap)
    for row, cells in zip(table.rows, zip(*(column.cells for column in columns), strict=True), strict=True):
        part.add_row(*cells, style=row.style, end_section=row.end_section)
    return part
