"""Writes a LoadTrace in the formats that others read: by the suffix of the file."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from equipoise.errors import ConfigError
from equipoise.formats.atomic_file import write_whole
from equipoise.formats.trace_file import TraceDescription
from equipoise.formats.trace_writer import TraceWriter
from equipoise.load.trace import LoadTrace

_STEPS_AT_ONCE = 64


def export_trace(trace: LoadTrace, path: str | os.PathLike[str]) -> None:
    """Writes a trace whole or not at all; the suffix says the format, see :data:`WRITERS`.

    Raises:
        ConfigError: an unknown suffix, a value that the format cannot hold, or a file that cannot be written.
    """
    target = Path(path)
    if target.suffix not in WRITERS:
        raise ConfigError(
            f"out {target}: the suffix must be one of {', '.join(WRITERS)}, got {target.suffix!r}", field="out"
        )
    try:
        WRITERS[target.suffix](trace, target)
    except OSError as error:
        raise ConfigError(f"out {target}: cannot be written: {error.strerror}", field="out") from error


def write_trace_file(trace: LoadTrace, path: Path) -> None:
    """Equipoise's trace format: tokens where they are known, else counts of each source rank, else counts."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    placements = None if trace.physical_to_logical_map is None else trace.physical_to_logical_map[None]
    try:
        with TraceWriter(partial, describe_trace(trace), placements) as writer:
            if trace.topk_ids is not None and trace.token_offsets is not None:
                sizes = np.diff(trace.token_offsets)
                writer.append(
                    trace.topk_ids,
                    forward_pass_ids=np.repeat(trace.forward_pass_ids, sizes),
                    phases=None if trace.phases is None else np.repeat(trace.phases, sizes),
                    timestamps=None if trace.timestamps is None else np.repeat(trace.timestamps, sizes),
                    placement=0 if placements is not None else -1,
                )
            else:
                _append_counts(writer, trace, 0 if placements is not None else -1)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _append_counts(writer: TraceWriter, trace: LoadTrace, placement: int) -> None:
    counts = trace.logical_count[:, None] if trace.rank_count is None else trace.rank_count
    for start in range(0, trace.num_steps, _STEPS_AT_ONCE):
        part = slice(start, start + _STEPS_AT_ONCE)
        writer.append(
            counts[part],
            forward_pass_ids=trace.forward_pass_ids[part],
            phases=None if trace.phases is None else trace.phases[part],
            timestamps=None if trace.timestamps is None else trace.timestamps[part],
            placement=placement,
        )


def describe_trace(trace: LoadTrace) -> TraceDescription:
    """What a trace file says of all its steps."""
    tokens = trace.topk_ids is not None
    counts = trace.logical_count if trace.rank_count is None else trace.rank_count
    count_type = "f8" if counts.dtype.kind == "f" else "i4" if int(counts.max(initial=0)) < 2**31 else "i8"
    topology: dict[str, int] = {
        k: trace.metadata[k] for k in ("num_ranks", "num_nodes", "slots_per_rank") if k in trace.metadata
    }
    top_k = trace.topk_ids.shape[2] if trace.topk_ids is not None else trace.metadata.get("top_k")
    contiguous = np.array_equal(trace.layer_ids, np.arange(trace.num_layers))
    return TraceDescription(
        num_layers=trace.num_layers,
        num_logical_experts=trace.num_logical_experts,
        source_ranks=1 if trace.rank_count is None or tokens else trace.rank_count.shape[1],
        count_type=count_type,
        top_k=top_k if isinstance(top_k, int) else None,
        tokens=tokens,
        id_type="i2" if trace.num_logical_experts < 2**15 else "i4",
        layer_ids=None if contiguous else trace.layer_ids.tolist(),
        model=trace.metadata.get("model"),
        topology=topology or None,
        metadata=trace.metadata,
    )


def _write_csv(trace: LoadTrace, path: Path) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", "layer", "expert", "count"])
    for index, step in enumerate(trace.forward_pass_ids.tolist()):
        # Zeros too: a reader knows the number of experts, and an idle one is news.
        for (layer, expert), count in np.ndenumerate(trace.logical_count[index]):
            writer.writerow([step, int(trace.layer_ids[layer]), expert, count])
    with write_whole(path) as file:
        file.write(text.getvalue().encode())


def _write_json(trace: LoadTrace, path: Path) -> None:
    with write_whole(path) as file:
        file.write(json.dumps({"logical_count": trace.logical_count.tolist()}).encode())


def _write_stat(trace: LoadTrace, path: Path) -> None:
    if trace.logical_count.dtype.kind == "f" or int(trace.logical_count.max(initial=0)) >= 2**31:
        raise ConfigError(
            f"out {path}: SGLang's stat dump holds int32 counts; these have fractions or are larger", field="out"
        )
    content: dict[str, Any] = {
        "rank": 0,
        "logical_count": torch.from_numpy(np.array(trace.logical_count, dtype=np.int32)),
        "average_utilization_rate_over_window": None,
    }
    with write_whole(path) as file:
        torch.save(content, file)


WRITERS: MappingProxyType[str, Callable[[LoadTrace, Path], None]] = MappingProxyType(
    {
        ".safetensors": write_trace_file,
        ".npz": lambda trace, path: trace.save(path),
        ".csv": _write_csv,
        ".json": _write_json,
        ".pt": _write_stat,
    }
)
