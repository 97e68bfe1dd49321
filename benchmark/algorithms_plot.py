"""The frontier of balance versus moves as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from algorithms_workloads import KINDS


def draw_frontier(report: dict[str, Any], path: Path) -> None:
    """Next-window balancedness over moves per replan, a panel for each kind of load."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = report["next_window"]
    panels = [
        (title, rows)
        for kind, title in KINDS.items()
        if (rows := [row for row in runs.values() if row["kind"] == kind])
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(6.4 * len(panels), 4.4), squeeze=False, layout="constrained")
    for axis, (title, rows) in zip(axes[0], panels, strict=True):
        points = {
            name: (
                100 * float(np.mean([row[name]["moves"] for row in rows])),
                float(np.mean([row[name]["balancedness"] for row in rows])),
            )
            for name in rows[0]
            if name != "kind"
        }
        line = sorted(point for name, point in points.items() if name.startswith("equipoise") and "full" not in name)
        axis.plot(
            *zip(points["reweight"], *line, strict=True), color="tab:blue", marker="o", label="equipoise, by price"
        )
        axis.plot(
            *points["equipoise"], color="tab:blue", marker="*", markersize=16, linestyle="", label="equipoise, default"
        )
        labels: dict[tuple[float, float], list[str]] = {}
        height = max(y for _, y in points.values()) - min(y for _, y in points.values())
        for name, point in points.items():
            if name == "equipoise" or (name.startswith("equipoise,") and "full" not in name):
                continue
            # Policies that plan alike lie on one another, or nearly: one label for all.
            near = (at for at in labels if abs(at[0] - point[0]) < 3 and abs(at[1] - point[1]) < 0.03 * height)
            labels.setdefault(next(near, point), []).append(name)
        for point, names in labels.items():
            axis.plot(*point, marker="s", color="tab:gray", linestyle="")
            left = point[0] > 50
            place: dict[str, Any] = {"xytext": (-6 if left else 6, 0), "ha": "right" if left else "left"}
            axis.annotate("\n".join(names), point, textcoords="offset points", va="center", fontsize=8, **place)
        axis.set_title(f"{title}: mean of {len(rows)} sequences")
        axis.set_xlabel("slots moved per replan, %")
        axis.set_ylabel("balancedness of the next window")
        axis.grid(alpha=0.3)
        axis.legend(loc="center", fontsize=8)
        axis.margins(y=0.1)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_recourse(report: dict[str, Any], path: Path) -> None:
    """Next-window balancedness over moves for the three kinds of dispatch, by price of a move; nothing without it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = report.get("batch", {}).get("frontier", {})
    places = list(dict.fromkeys(name.split()[0] for name in rows))
    if not places:
        return
    figure, axes = plt.subplots(1, len(places), figsize=(5.4 * len(places), 4.0), squeeze=False, layout="constrained")
    for axis, place in zip(axes[0], places, strict=True):
        for kind in dict.fromkeys(name.split()[1].rstrip(",") for name in rows):
            line = [row for name, row in rows.items() if name.startswith(f"{place} {kind},")]
            axis.plot(
                [100 * row["moves"] for row in line], [row["balancedness"] for row in line], marker="o", label=kind
            )
        axis.set(
            title=f"{place}, task after task", xlabel="slots moved a replan, %", ylabel="balance of the next window"
        )
        axis.grid(alpha=0.3)
        axis.legend(title="dispatch")
    figure.savefig(path, dpi=110)
    plt.close(figure)
