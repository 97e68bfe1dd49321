"""Tables and legends fit the terminal that they are printed on."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from equipoise.cli.tables import print_paragraphs, print_table
from equipoise.load.synthetic import SyntheticLoad, synthetic_trace
from equipoise.load.windows import cut_windows
from equipoise.replay.config import ReplayConfig
from equipoise.replay.report import legend, to_table
from equipoise.replay.result import ReplayResult
from equipoise.replay.simulate import replay
from equipoise.topology import EpTopology


@pytest.fixture(scope="module")
def results() -> list[ReplayResult]:
    trace = synthetic_trace(SyntheticLoad(32, 2, 16, tokens_per_step=256, top_k=2, seed=1))
    windows = cut_windows([trace], ReplayConfig().window)
    topology = EpTopology.for_experts(16, 8, 8, 2)
    return [replay(windows, topology, name, expert_bytes=1 << 24) for name in ("deepseek_hierarchical", "equipoise")]


def printed(width: int, is_terminal: bool, table: Table, text: str = "") -> list[str]:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=is_terminal, color_system=None, legacy_windows=False)
    print_table(table, console)
    print_paragraphs(text, console)
    return out.getvalue().splitlines()


def words(lines: list[str]) -> list[str]:
    """Without the rules below headers, which are as long as their table is wide."""
    return " ".join(line for line in lines if not line.startswith("|--")).split()


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_replay_fits_the_terminal(width: int, results: list[ReplayResult]) -> None:
    table, text = to_table(results, "Replay of a.npz"), legend(results)
    lines = printed(width, True, table, text)
    assert max(map(len, lines)) <= width
    assert set(words(lines)) == set(words(printed(1000, True, table, text)))
    assert words(lines).count("Replay") == 1


@pytest.mark.parametrize("width", [80, 100])
def test_a_pasted_table_is_whole(width: int, results: list[ReplayResult]) -> None:
    table = to_table(results, "Replay of a.npz")
    assert printed(width, False, table) == printed(1000, False, table)


def test_cells_stay_in_their_row_and_column() -> None:
    table = Table("name", *(f"column {i}" for i in range(9)))
    for row in range(3):
        table.add_row(f"row {row}", *(f"cell {row}.{i}" for i in range(9)))
    cells = np.array([f"cell {row}.{i}" for row in range(3) for i in range(9)])
    lines = printed(40, True, table)
    for cell in cells:
        (line,) = [line for line in lines if cell in line]
        assert f"row {cell[5]}" in line
        header = [each for each in lines[: lines.index(line)] if "column" in each][-1]
        assert header.index(f"column {cell[-1]}") <= line.index(cell) <= header.index(f"column {cell[-1]}") + 8


def test_a_column_that_is_wider_than_the_terminal_is_printed_all_the_same() -> None:
    table = Table("name")
    table.add_column("value", no_wrap=True)
    table.add_row("a", "x" * 60)
    assert "x" * 60 in "".join(printed(40, True, table))
