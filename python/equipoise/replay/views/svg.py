"""Small pictures for a page, drawn as SVG text: heat maps, curves, points. Colours are the page's CSS variables."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 12, 34
_MAX_CELLS = 64


def heat_map(values: np.ndarray, row_labels: Sequence[int], title: str) -> str:
    """(rows, columns) of load over mean: white at 1, warm above, cool below.

    More rows or columns than fit are shown as the largest of a few.
    """
    rows = np.array_split(np.arange(values.shape[0]), min(_MAX_CELLS, values.shape[0]))
    columns = np.array_split(np.arange(values.shape[1]), min(_MAX_CELLS, values.shape[1]))
    cell_w, cell_h = (WIDTH - _LEFT - _RIGHT) / len(columns), (HEIGHT - _TOP - _BOTTOM) / len(rows)
    parts = []
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            block = values[np.ix_(row, column)]
            value = float(np.nanmax(block)) if not np.isnan(block).all() else float("nan")
            shown = "idle" if np.isnan(value) else f"{value:.2f} x mean"
            parts.append(
                f'<rect x="{_LEFT + j * cell_w:.1f}" y="{_TOP + i * cell_h:.1f}" width="{cell_w + 0.3:.1f}" '
                f'height="{cell_h + 0.3:.1f}" fill="{heat_colour(value)}"><title>layer {row_labels[row[0]]}, rank '
                f"{column[0]}: {shown}</title></rect>"
            )
    parts.append(_text(_LEFT, HEIGHT - 10, f"rank 0 to {values.shape[1] - 1}"))
    parts.append(_text(4, _TOP + 12, str(row_labels[0])))
    parts.append(_text(4, HEIGHT - _BOTTOM, str(row_labels[-1])))
    worst = float(np.nanmax(values)) if not np.isnan(values).all() else float("nan")
    parts.append(_text(WIDTH - _RIGHT, HEIGHT - 10, f"hottest rank {worst:.2f} x mean", "end"))
    return _svg(parts, title)


def heat_colour(value: float) -> str:
    """A colour that reads on light and dark: grey-white at 1, red at 2 and above, blue at 0."""
    if np.isnan(value):
        return "var(--idle)"
    far = min(1.0, abs(value - 1.0))
    low, high = (238, 238, 232), (196, 40, 32) if value > 1 else (44, 96, 170)
    red, green, blue = (round(a + (b - a) * far) for a, b in zip(low, high, strict=True))
    return f"rgb({red},{green},{blue})"


def curves(series: Sequence[tuple[str, Sequence[float]]], title: str, x_label: str) -> str:
    """Lines over steps, y from 0 to 1."""
    low = max(0.0, np.floor(10 * min(min(values) for _, values in series if len(values)) - 0.5) / 10)
    parts = _y_axis(low, 1.0)
    for index, (label, values) in enumerate(series):
        x = np.linspace(_LEFT, WIDTH - _RIGHT, max(2, len(values)))
        y = _y(np.array(values), low, 1.0)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=False))
        parts.append(f'<polyline points="{points}" class="line c{index}"><title>{escape(label)}</title></polyline>')
    parts.append(_text(_LEFT, HEIGHT - 10, x_label))
    return _svg(parts, title)


def points(series: Sequence[tuple[str, float, float]], title: str, chosen: str | None) -> str:
    """Balance against bytes: x bytes moved, y balancedness."""
    largest = max((x for _, x, _ in series), default=1.0) or 1.0
    low = max(0.0, np.floor(10 * min((y for *_, y in series), default=0.0) - 0.5) / 10)
    parts = _y_axis(low, 1.0)
    for label, x, y in series:
        px = _LEFT + (WIDTH - _LEFT - _RIGHT - 8) * x / largest + 4
        py = float(_y(np.array(y), low, 1.0))
        group = "p0" if label.startswith("deepseek") else "p1"
        ring = ' class="chosen"' if label == chosen else f' class="{group}"'
        size = 7 if label == chosen else 4
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{size}"{ring}><title>{escape(label)}</title></circle>')
    parts.append(_text(_LEFT, HEIGHT - 10, "0"))
    parts.append(_text(WIDTH - _RIGHT, HEIGHT - 10, f"{largest / 2**30:.1f} GiB moved", "end"))
    return _svg(parts, title)


def _y(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return _TOP + (HEIGHT - _TOP - _BOTTOM) * (high - values) / (high - low)


def _y_axis(low: float, high: float) -> list[str]:
    parts = []
    for value in np.linspace(low, high, 5):
        y = float(_y(np.array(value), low, high))
        parts.append(f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(_text(4, y + 4, f"{value:.2f}"))
    return parts


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(parts: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">'
        + "".join(parts)
        + "</svg>"
    )
