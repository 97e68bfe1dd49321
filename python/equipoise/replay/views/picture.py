"""A comparison as one picture, for slides."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from equipoise.errors import ConfigError
from equipoise.replay.views.report_data import ReportData


def draw_picture(data: ReportData, path: Path) -> None:
    """Draws rank loads before and after, and balancedness over the trace.

    Raises:
        ConfigError: matplotlib is not installed, or the picture cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("png needs matplotlib: pip install equipoise[plot]", field="png") from None
    figure = Figure(figsize=(12.8, 4.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.5))
    for axis, heat, title in zip(
        axes, (data.heat_before, data.heat_after), ("as engines start", "recommended"), strict=False
    ):
        image = axis.imshow(heat, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
        worst = np.nanmax(heat)
        axis.set_title(f"{title}: hottest {worst:.2f} x mean", fontsize=10)
        axis.set(xlabel="rank", ylabel="layer")
    figure.colorbar(image, ax=axes[1], label="load / mean of the layer")
    styles = ("#777777", "#b8571f", "#0b7a5b", "#3b5fb0")
    for (label, values), colour in zip(data.curves, styles, strict=False):
        axes[2].plot(values, label=label, color=colour, linestyle="--" if label == "oracle" else "-")
    axes[2].set(title="balancedness, mean over layers", xlabel="steps of the trace", ylim=(None, 1.02))
    axes[2].legend(loc="lower right", fontsize=9)
    gain = f"{data.advice.gain:+.1%} tokens/s" if data.advice.row is not None else "balancing would not pay"
    figure.suptitle(f"{data.traces} on {data.cluster}: {gain}")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"png {path}: cannot be written: {error}", field="png") from error
