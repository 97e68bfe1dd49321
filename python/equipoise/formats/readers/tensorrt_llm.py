"""TensorRT-LLM: expert statistics (one safetensors file a rank, ``meta_info.json`` beside them) and YAML assignments.

Statistics (``_torch/expert_statistic.py``): tensors named ``"{iteration}_{layer}"``, each int64 (E,), what that rank's
tokens chose; ``meta_info.json`` says ``num_experts`` and ``num_experts_per_token``. ``*_raw.safetensors`` beside them
are left alone. Layer numbers are the model's own, so they begin behind its dense layers.

Assignments (``moe_load_balancer`` YAML): ``num_slots``, ``layer_updates_per_iter``, ``initial_global_assignments``
{layer: [expert of each slot]}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.errors import TraceError
from equipoise.formats.archive import MAX_EXPERTS, require_size
from equipoise.formats.container import Container, SafetensorsHeader, map_tensor
from equipoise.formats.numbers import human_list, require_counts, require_integer
from equipoise.formats.raw_trace import RawTrace, ReadOptions

_KEY = re.compile(r"^(\d{1,9})_(\d{1,6})$")
_FILE = re.compile(r"^rank(\d{1,6})\.safetensors$")


def is_statistics(container: Container) -> bool:
    return container.kind == "safetensors" and bool(container.names) and all(map(_KEY.match, container.names))


def files_of_folder(folder: Path) -> list[Path]:
    """The statistics of all ranks in a folder, in rank order; none if it holds no ``meta_info.json``."""
    if not (folder / "meta_info.json").is_file():
        return []
    found = [(int(match.group(1)), path) for path in folder.iterdir() if (match := _FILE.match(path.name))]
    return [path for _, path in sorted(found)]


def read_statistics(containers: Sequence[Container], _options: ReadOptions) -> RawTrace:
    """The statistics of one or more ranks, summed; counts of each rank are kept beside.

    Raises:
        TraceError: files of other shapes than the first, or counts that are none.
    """
    headers = [container.content for container in containers]
    keys = sorted({tuple(map(int, name.split("_"))) for header in headers for name in header.tensors})
    iterations = sorted({iteration for iteration, _ in keys})
    layers = sorted({layer for _, layer in keys})
    num_experts = _num_experts(headers[0])
    meta, notes = _meta_info(containers[0].path.parent, num_experts)
    require_size("statistics", (len(containers), len(iterations), len(layers), num_experts))
    per_rank = np.zeros((len(iterations), len(containers), len(layers), num_experts), dtype=np.int64)
    row = {iteration: index for index, iteration in enumerate(iterations)}
    column = {layer: index for index, layer in enumerate(layers)}
    present = np.zeros((len(iterations), len(containers)), dtype=bool)
    for rank, (container, header) in enumerate(zip(containers, headers, strict=True)):
        for name in header.tensors:
            iteration, layer = map(int, name.split("_"))
            counts = map_tensor(container.path, header, name)
            if counts.shape != (num_experts,) or counts.dtype.kind not in "iu":
                raise TraceError(f"{container.path.name}: {name} must be ({num_experts},) integers, got {counts.shape}")
            require_counts(counts, name)
            per_rank[row[iteration], rank, column[layer]] = counts
            present[row[iteration], rank] = True
    whole = present.all(1)
    if not whole.all():
        notes.append(
            f"{int((~whole).sum())} of {len(iterations)} iterations are left out: not every rank recorded them"
        )
    if not whole.any():
        raise TraceError("no iteration was recorded by every rank")
    ranks = [_rank_of(container.path) for container in containers]
    if len(ranks) == 1:
        notes.append(f"recorded by ranks {ranks} only: give the folder, or the files of all ranks together")
    per_rank = per_rank[whole]
    return RawTrace(
        per_rank.sum(1),
        np.array(iterations)[whole],
        metadata={"source": "tensorrt_llm statistics", "ranks": ranks, **meta},
        layer_ids=np.array(layers),
        rank_count=per_rank if len(ranks) > 1 else None,
        found=f"TensorRT-LLM expert statistics of ranks {human_list(ranks, 4)}",
        notes=tuple(notes),
    )


def _num_experts(header: SafetensorsHeader) -> int:
    shape = next(iter(header.tensors.values()))["shape"]
    if len(shape) != 1 or not 0 < shape[0] <= MAX_EXPERTS:
        raise TraceError(f"statistics must be one count an expert, got shape {tuple(shape)}")
    return int(shape[0])


def _rank_of(path: Path) -> int:
    match = _FILE.match(path.name)
    return int(match.group(1)) if match else 0


def _meta_info(folder: Path, num_experts: int) -> tuple[dict[str, Any], list[str]]:
    path = folder / "meta_info.json"
    try:
        meta = json.loads(path.read_text()) if path.is_file() and path.stat().st_size < 1 << 20 else None
    except (ValueError, OSError, RecursionError):
        meta = None
    if not isinstance(meta, dict):
        return {}, ["meta_info.json is missing or damaged: nothing but the counts is known"]
    if meta.get("num_experts") not in (None, num_experts):
        raise TraceError(f"meta_info.json says {meta.get('num_experts')!r} experts, the statistics have {num_experts}")
    top_k = meta.get("num_experts_per_token")
    return ({"top_k": top_k} if isinstance(top_k, int) else {}), []


def is_assignments(content: Any) -> bool:
    return isinstance(content, dict) and "initial_global_assignments" in content


def read_assignments(content: dict[Any, Any]) -> np.ndarray:
    """The placement of an assignments YAML: (L, P) int64, layers in ascending order.

    Raises:
        TraceError: no list of ``num_slots`` experts for a layer.
    """
    layers = content["initial_global_assignments"]
    if not isinstance(layers, dict) or not layers:
        raise TraceError("initial_global_assignments must map layers to lists of experts")
    numbered = sorted((require_integer(_as_int(layer), f"layer {layer!r}"), row) for layer, row in layers.items())
    widths = {len(row) if isinstance(row, list) else 0 for _, row in numbered}
    num_slots = content.get("num_slots", max(widths))
    if widths != {num_slots} or not num_slots:
        raise TraceError(f"every layer must list num_slots={num_slots!r} experts, got lists of {sorted(widths)}")
    for layer, row in numbered:
        for slot, expert in enumerate(row):
            require_integer(expert, f"initial_global_assignments[{layer}][{slot}]", 0, MAX_EXPERTS - 1)
    return np.array([row for _, row in numbered], dtype=np.int64)


def _as_int(key: Any) -> Any:
    return int(key) if isinstance(key, str) and key.isdigit() and len(key) < 10 else key


def write_assignments(physical_to_logical_map: np.ndarray, layer_ids: Sequence[int]) -> str:
    """The YAML that ``moe_load_balancer`` names; a placement that stays (``layer_updates_per_iter: 0``)."""
    lines = [f"num_slots: {physical_to_logical_map.shape[1]}", "layer_updates_per_iter: 0",
             "initial_global_assignments:"]  # fmt: skip
    lines += [f"  {layer}: {row.tolist()}" for layer, row in zip(layer_ids, physical_to_logical_map, strict=True)]
    return "\n".join(lines) + "\n"
