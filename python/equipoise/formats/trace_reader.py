"""Reads Equipoise's trace format; see :mod:`equipoise.formats.trace_file` for what it is."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.errors import TraceError
from equipoise.formats.container import SafetensorsHeader, map_tensor
from equipoise.formats.raw_trace import PHASE_NAMES, RawTrace
from equipoise.formats.trace_file import TraceDescription, closing_of, description_of, whole_records


def read_trace(path: Path, header: SafetensorsHeader) -> RawTrace:
    """Opens a trace file, memory-mapped, up to its last whole step.

    Raises:
        TraceError: not this format, or not one whole step in it.
    """
    description = description_of(header)
    if "steps" not in header.tensors:
        raise TraceError("tensor 'steps' is missing")
    records = whole_records(path, header, description.record())
    notes = []
    told = header.tensors["steps"]["shape"][0]
    if told != len(records):
        notes.append(f"the writer did not close the file: its header says {told} records, {len(records)} are whole")
    if description.tokens and told != len(records) and len(records):
        whole = records["forward_pass_id"] != records["forward_pass_id"][-1]
        records = records[: int(whole.sum())]  # the last step may have lost tokens
    if not len(records):
        raise TraceError("holds no whole step")
    placements = map_tensor(path, header, "placements") if "placements" in header.tensors else None
    raw = _to_raw(records, description, placements, notes)
    if (closing := closing_of(header)) is not None:
        raw.metadata["closing"] = closing
    return raw


def _to_raw(
    records: np.ndarray, description: TraceDescription, placements: np.ndarray | None, notes: list[str]
) -> RawTrace:
    phases = np.clip(np.array(records["phase"]), 0, len(PHASE_NAMES) - 1)
    times = np.array(records["timestamp"])
    metadata = {"source": "equipoise trace", **description.metadata}
    for name in ("model", "top_k"):
        if getattr(description, name) is not None:
            metadata[name] = getattr(description, name)
    metadata.update(description.topology or {})
    raw: dict[str, Any] = {"metadata": metadata, "notes": tuple(notes)}
    raw["layer_ids"] = None if description.layer_ids is None else np.array(description.layer_ids)
    if placements is not None and int(records["placement"][-1]) in range(len(placements)):
        raw["physical_to_logical_map"] = np.array(placements[int(records["placement"][-1])], dtype=np.int64)
    if description.tokens:
        return _tokens_to_raw(records, description, phases, times, raw)
    counts = records["counts"]
    ranks = description.source_ranks
    return RawTrace(
        counts[:, 0] if ranks == 1 else counts.sum(1, dtype=np.float64 if description.count_type == "f8" else np.int64),
        np.array(records["forward_pass_id"]),
        phases=phases if phases.any() else None,
        timestamps=None if np.isnan(times).all() else times,
        rank_count=counts if ranks > 1 else None,
        found=f"Equipoise trace of {len(records)} steps" + (f", {ranks} ranks" if ranks > 1 else ""),
        **raw,
    )


def _tokens_to_raw(
    records: np.ndarray, description: TraceDescription, phases: np.ndarray, times: np.ndarray, raw: dict[str, Any]
) -> RawTrace:
    steps, first = np.unique(records["forward_pass_id"], return_index=True)
    order = np.argsort(first)
    offsets = np.append(first[order], len(records))
    ids = records["topk_ids"]
    if int(ids.max()) >= description.num_logical_experts:
        raise TraceError(f"names expert {int(ids.max())} of {description.num_logical_experts}")
    counts = np.zeros((len(steps), description.num_layers, description.num_logical_experts), dtype=np.int32)
    for step, (start, end) in enumerate(pairwise(offsets.tolist())):
        for layer in range(description.num_layers):
            chosen = ids[start:end, layer].ravel()
            counts[step, layer] = np.bincount(chosen[chosen >= 0], minlength=description.num_logical_experts)
    return RawTrace(
        counts,
        steps[order],
        phases=phases[offsets[:-1]] if phases.any() else None,
        timestamps=None if np.isnan(times).all() else times[offsets[:-1]],
        topk_ids=ids,
        token_offsets=offsets,
        found=f"Equipoise trace of {len(records)} tokens in {len(steps)} steps",
        **raw,
    )
