"""Counts as text: CSV, JSON, and one JSON object a line as training frameworks log them.

CSV: a header with ``layer``, ``expert`` and ``count`` (also ``tokens``, ``load``), and if there is one ``step`` (also
``iteration``, ``forward_pass_id``) and ``rank``; other columns are ignored with a word. Without a header, three columns
are layer, expert, count.

JSON: ``{"logical_count": [[...]]}`` (L, E) or (T, L, E), or ``{layer: {expert: count}}`` as MindSpeed-RL collects it.

JSON lines: ``{"iteration": 3, "layer": 0, "tokens_per_expert": [...]}``, a ``rank`` where each logs its own; Megatron's
``tokens_per_expert`` of every router in training logs has this form.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from equipoise.errors import TraceError
from equipoise.formats.archive import MAX_EXPERTS, require_size
from equipoise.formats.container import Container
from equipoise.formats.numbers import as_counts, as_numbers, human_list
from equipoise.formats.raw_trace import RawTrace, ReadOptions

_COLUMNS = {
    "layer": ("layer", "layer_id", "layer_idx", "layer_number", "moe_layer"),
    "expert": ("expert", "expert_id", "logical_expert"),
    "count": ("count", "tokens", "num_tokens", "load", "token_count"),
    "step": ("step", "iteration", "iter", "forward_pass_id", "window"),
    "rank": ("rank", "ep_rank", "dp_rank", "source_rank"),
}
_PER_EXPERT = ("tokens_per_expert", "expert_counts", "num_tokens_per_expert", "load")
_MAX_ID = 1 << 31
_LOOKED_AT = 1000  # lines of a log, before it is said to hold no counts


def is_csv(container: Container) -> bool:
    return container.kind == "csv"


def read_csv(container: Container, options: ReadOptions) -> RawTrace:
    """Sums what the rows say; a pair of layer and expert that no row names has no token."""
    rows: list[list[str]] = container.content
    where, notes = _columns(rows[0])
    body = rows[1:] if where is not None else rows
    if where is None:
        where = {"layer": 0, "expert": 1, "count": 2}
        notes = ["no header: the columns are taken for layer, expert, count"]
    if not body:
        raise TraceError("a CSV with a header and no rows")
    table = np.array([_row(row, where, index) for index, row in enumerate(body)], dtype=np.float64)
    layer, expert, count = (table[:, index] for index in range(3))
    step = table[:, 3] if "step" in where else np.zeros(len(table))
    rank = table[:, 4] if "rank" in where else None
    return _from_triples(step, layer, expert, count, rank, options, "CSV of layer, expert, count", notes)


def _columns(header: list[str]) -> tuple[dict[str, int] | None, list[str]]:
    names = [name.strip().lower() for name in header]
    where = {
        key: names.index(found[0]) for key, known in _COLUMNS.items() if (found := [n for n in known if n in names])
    }
    if not {"layer", "expert", "count"} <= where.keys():
        if len(header) == 3 and all(_is_number(cell) for cell in header):
            return None, []
        raise TraceError(f"a CSV needs the columns layer, expert and count, this one has {human_list(header)}")
    ignored = [name for index, name in enumerate(names) if index not in where.values()]
    return where, [f"columns {human_list(ignored)} are ignored"] if ignored else []


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _row(row: list[str], where: dict[str, int], index: int) -> list[float]:
    values = []
    for key in ("layer", "expert", "count", "step", "rank"):
        if key not in where:
            values.append(0.0)
            continue
        try:
            values.append(float(row[where[key]]))
        except (ValueError, IndexError):
            cell = row[where[key]] if where[key] < len(row) else "nothing"
            raise TraceError(f"row {index + 1}: {key} must be a number, got {cell[:40]!r}") from None
    return values


def is_json_counts(container: Container) -> bool:
    content = container.content
    return (
        container.kind == "json" and isinstance(content, dict) and ("logical_count" in content or _is_nested(content))
    )


def _is_nested(content: dict[str, Any]) -> bool:
    return bool(content) and all(key.isdigit() and isinstance(value, dict) for key, value in content.items())


def read_json_counts(container: Container, options: ReadOptions) -> RawTrace:
    content = container.content
    if "logical_count" in content:
        counts = as_counts(as_numbers(content["logical_count"], "logical_count", (2, 3)), "logical_count")
        ignored = sorted(content.keys() - {"logical_count"})
        notes = (f"keys {human_list(ignored)} are ignored",) if ignored else ()
        return RawTrace(
            counts[None] if counts.ndim == 2 else counts,
            metadata={"source": "json counts"},
            found="JSON with logical_count",
            notes=notes,
        )
    triples = [(layer, expert, count) for layer, experts in content.items() for expert, count in experts.items()]
    try:
        table = np.array([[float(each) for each in triple] for triple in triples], dtype=np.float64)
    except (TypeError, ValueError):
        raise TraceError("JSON of {layer: {expert: count}} must hold numbers only") from None
    if not len(table):
        raise TraceError("JSON of {layer: {expert: count}} holds no count")
    zeros = np.zeros(len(table))
    return _from_triples(
        zeros, table[:, 0], table[:, 1], table[:, 2], None, options, "JSON of {layer: {expert: count}}", []
    )


def is_json_lines(container: Container) -> bool:
    lines = container.content if container.kind == "jsonl" else [container.content]
    if container.kind not in ("json", "jsonl"):
        return False
    return any(isinstance(line, dict) and any(name in line for name in _PER_EXPERT) for line in lines[:_LOOKED_AT])


def read_json_lines(container: Container, options: ReadOptions) -> RawTrace:
    """One line a step and layer (and rank); lines without counts are other log lines, left out with a word."""
    lines = container.content if container.kind == "jsonl" else [container.content]
    found, skipped = [], 0
    for index, line in enumerate(lines):
        name = next((n for n in _PER_EXPERT if isinstance(line, dict) and n in line), None)
        if name is None:
            skipped += 1
            continue
        counts = as_counts(as_numbers(line[name], f"line {index + 1}: {name}", (1, 2)), f"line {index + 1}: {name}")
        step, layer, rank = (_line_number(line, key, index) for key in ("step", "layer", "rank"))
        for offset, row in enumerate(counts if counts.ndim == 2 else counts[None]):
            found.append((step or 0, (layer or 0) + offset, rank, row))
    if not found:
        raise TraceError(f"no line names {' or '.join(_PER_EXPERT)}")
    widths = {len(row) for *_, row in found}
    if len(widths) > 1:
        raise TraceError(f"lines count different numbers of experts: {human_list(sorted(widths))}")
    num_experts = widths.pop()
    steps, layers, ranks, rows = zip(*found, strict=True)
    expert = np.tile(np.arange(num_experts), len(found))
    at_step, at_layer = (np.repeat(np.array(ids, dtype=np.float64), num_experts) for ids in (steps, layers))
    at_rank = None if None in ranks else np.repeat(np.array(ranks, dtype=np.float64), num_experts)
    notes = [f"{skipped} lines without counts are ignored"] if skipped else []
    counts = np.concatenate(rows).astype(np.float64)
    known = ReadOptions(options.tokens_per_step, num_experts, options.read_as)
    return _from_triples(at_step, at_layer, expert, counts, at_rank, known, "JSON lines of tokens per expert", notes)


def _line_number(line: dict[str, Any], key: str, index: int) -> int | None:
    name = next((n for n in _COLUMNS[key] if n in line), None)
    if name is None:
        return None
    value = line[name]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _MAX_ID:
        raise TraceError(f"line {index + 1}: {name} must be an integer of at least 0, got {str(value)[:40]}")
    return value


def _from_triples(
    step: np.ndarray,
    layer: np.ndarray,
    expert: np.ndarray,
    count: np.ndarray,
    rank: np.ndarray | None,
    options: ReadOptions,
    found: str,
    notes: Iterable[str],
) -> RawTrace:
    """Counts at (step, layer, expert) as an array; ids need not be contiguous except those of experts."""
    notes = list(notes)
    for name, ids in (
        ("step", step),
        ("layer", layer),
        ("expert", expert),
        ("rank", np.zeros(1) if rank is None else rank),
    ):
        bad = ~((ids >= 0) & (ids < _MAX_ID) & (ids == np.rint(ids)))
        if bad.any():
            raise TraceError(f"{name} must be a whole number of at least 0, got {ids[bad][0]:g}")
    highest = int(expert.max()) + 1
    num_experts = options.num_logical_experts or highest
    if highest > min(num_experts, MAX_EXPERTS):
        raise TraceError(f"names expert {highest - 1}, outside [0, {min(num_experts, MAX_EXPERTS)})")
    if options.num_logical_experts is None:
        notes.append(
            f"the number of experts is guessed from the highest id: {num_experts}; --num-logical-experts sets it"
        )
    steps, step_of = np.unique(step, return_inverse=True)
    layers, layer_of = np.unique(layer, return_inverse=True)
    ranks, rank_of = np.unique(np.zeros(len(step)) if rank is None else rank, return_inverse=True)
    shape = (len(steps), len(ranks), len(layers), num_experts)
    require_size("counts", shape)
    counts = np.zeros(shape)
    np.add.at(counts, (step_of, rank_of, layer_of, expert.astype(np.int64)), count)
    per_rank = as_counts(counts, "count")
    if rank is not None and len(ranks) == 1:
        notes.append(
            f"recorded by ranks [{int(ranks[0])}] only: what other ranks routed is missing, unless there was only one"
        )
    return RawTrace(
        per_rank.sum(1),
        steps.astype(np.int64),
        metadata={"source": found.split(" ", 1)[0].lower()},
        layer_ids=layers.astype(np.int64),
        rank_count=per_rank if len(ranks) > 1 else None,
        found=found if rank is None else f"{found}, {len(ranks)} ranks",
        notes=tuple(notes),
    )
