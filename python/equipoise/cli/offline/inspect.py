"""``equipoise inspect``: what a file is and what its load looks like."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from equipoise.cli.offline.options import Reading
from equipoise.cli.offline.recordings import files_of, opened
from equipoise.errors import InvalidInputError
from equipoise.formats.container import open_container
from equipoise.formats.expert_location import MapStart
from equipoise.formats.raw_trace import PHASE_NAMES
from equipoise.formats.readers.placements import placement_of
from equipoise.load.statistics import TraceStatistics, describe_load
from equipoise.load.trace import LoadTrace

_WORST = 5


def run_inspect(paths: Sequence[Path], reading: Reading, console: Console) -> int:
    """Says what files are, a recording or a placement. Returns 0.

    Raises:
        InvalidInputError: a file that is neither.
    """
    with files_of(paths) as files:
        placed = _placement(files)
        if placed is not None:
            _say_placement(placed, console)
            return 0
        with opened(files, reading, console) as traces:
            for trace in traces:
                _say_trace(trace, console)
    return 0


def _placement(files: Sequence[Path]) -> MapStart | None:
    if len(files) != 1 or files[0].is_dir():
        return None
    try:
        return placement_of(open_container(files[0]).content)
    except InvalidInputError:
        return None  # whoever reads it as a recording says what is wrong


def _say_placement(placed: MapStart, console: Console) -> None:
    p2l = placed.physical_to_logical_map
    num_layers, num_slots = p2l.shape
    num_experts = int(p2l.max()) + 1
    console.print(f"{placed.found}: {num_layers} layers, {num_slots} slots, {num_experts} experts", highlight=False)
    for note in placed.notes:
        console.print(f"  note: {note}", highlight=False, markup=False, style="yellow")
    replicas = np.stack([np.bincount(row, minlength=num_experts) for row in p2l])
    missing = int((replicas == 0).sum())
    console.print(f"replicas of an expert: {replicas.min()} to {replicas.max()}", highlight=False)
    if missing:
        console.print(f"  {missing} experts have no slot in some layer: no engine can serve this", style="red")
    if placed.topology is not None:
        shape = placed.topology
        console.print(
            f"{shape.num_ranks} ranks of {shape.slots_per_rank} slots in {shape.num_nodes} nodes", highlight=False
        )


def _say_trace(trace: LoadTrace, console: Console) -> None:
    found = describe_load(trace)
    known = [
        f"{name} {trace.metadata[key]}"
        for key, name in (("model", "model"), ("top_k", "top-k"), ("num_ranks", "ranks"), ("num_nodes", "nodes"))
        if key in trace.metadata
    ]
    if trace.rank_count is not None:
        known.append(f"counts of {trace.rank_count.shape[1]} source ranks apart")
    if trace.topk_ids is not None:
        known.append("expert ids of each token")
    if known:
        console.print("  known: " + ", ".join(known), highlight=False, markup=False)
    first, last = trace.forward_pass_ids[[0, -1]] if trace.num_steps else (0, 0)
    console.print(
        f"  forward passes {first} to {last}; {found.assignments:,.0f} assignments in the busiest layer",
        highlight=False,
    )
    _say_phases(trace, found, console)
    _say_drift(found, console)
    if found.idle_layers:
        ids = trace.layer_ids[list(found.idle_layers)].tolist()
        console.print(f"  layers without a token (dense, or not recorded): {ids}", highlight=False)
    if len(found.idle_layers) == trace.num_layers:
        return
    console.print(_worst_layers(trace, found))
    hot = ", ".join(f"expert {e} of layer {trace.layer_ids[layer]} ({share:.1%})" for layer, e, share in found.hottest)
    console.print(f"hottest: {hot}", highlight=False, markup=False)


def _say_phases(trace: LoadTrace, found: TraceStatistics, console: Console) -> None:
    if trace.phases is None:
        return
    counts = np.bincount(np.clip(trace.phases, 0, len(PHASE_NAMES) - 1), minlength=len(PHASE_NAMES))
    said = ", ".join(f"{count} {name}" for name, count in zip(PHASE_NAMES, counts, strict=True) if count)
    apart = (
        ""
        if found.phase_distance is None
        else f"; prefill and decode differ in {found.phase_distance:.0%} of their load"
    )
    console.print(f"  phases of steps: {said}{apart}", highlight=False)


def _say_drift(found: TraceStatistics, console: Console) -> None:
    drift = found.drift[~np.isnan(found.drift)]
    if not len(drift):
        return
    at = int(np.nanargmax(found.drift))
    console.print(
        f"  drift: from one eighth of the trace to the next {drift.mean():.1%} of the load changes experts, "
        f"most ({drift.max():.1%}) between parts {at + 1} and {at + 2}",
        highlight=False,
    )


def _worst_layers(trace: LoadTrace, found: TraceStatistics) -> Table:
    order = np.argsort(-np.nan_to_num(found.max_over_mean))[:_WORST]
    table = Table(box=box.SIMPLE, title="most uneven layers, and the mean of all", title_justify="left")
    for name in ("layer", "hottest / mean expert", "Gini", "experts unused"):
        table.add_column(name, justify="right")
    for row in order.tolist():
        table.add_row(
            str(trace.layer_ids[row]),
            f"{found.max_over_mean[row]:.2f}",
            f"{found.gini[row]:.3f}",
            str(found.unused[row]),
        )
    table.add_section()
    table.add_row(
        "mean", f"{np.nanmean(found.max_over_mean):.2f}", f"{np.nanmean(found.gini):.3f}", f"{found.unused.mean():.1f}"
    )
    return table
