"""Streamed recordings of ours: the trace files of all ranks put together, and what is missing in them said.

Each rank writes a file of its own, in which it counts its own tokens: the load of a step is the sum over ranks. The
description's metadata has ``recording``: ``{"id", "rank", "num_ranks"}``, equal in all files but for ``rank``. Once
closed, a file says in ``closing`` how many steps its rank dropped and which: ``{"num_dropped", "dropped", "error"}``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from equipoise.errors import TraceError
from equipoise.formats.archive import MAX_BYTES
from equipoise.formats.container import Container
from equipoise.formats.numbers import human_list, num_bytes
from equipoise.formats.raw_trace import RawTrace, ReadOptions
from equipoise.formats.trace_file import FORMAT, description_of
from equipoise.formats.trace_reader import read_trace

_STEPS_AT_ONCE = 64


class _Part(NamedTuple):
    """What a file says of the recording that it is a part of."""

    id: str
    rank: int
    num_ranks: int


def file_of_rank(folder: Path, rank: int) -> Path:
    """Where a rank of a streamed recording writes."""
    return folder / f"rank_{rank}.safetensors"


def files_of_folder(folder: Path) -> list[Path]:
    """The files of a streamed recording, all ranks that are there."""
    return sorted(folder.glob("rank_*.safetensors"))


def is_trace_file(container: Container) -> bool:
    return container.kind == "safetensors" and container.content.metadata.get("format") == FORMAT


def same_recording(left: Container, right: Container) -> bool:
    """Whether two trace files are of two ranks of one recording."""
    try:
        mine, theirs = (_part_of(description_of(one.content).metadata) for one in (left, right))
    except TraceError:
        return False
    return mine is not None and theirs is not None and mine.id == theirs.id and mine.rank != theirs.rank


def read_trace_files(containers: Sequence[Container], _options: ReadOptions) -> RawTrace:
    """One trace file, or those of the ranks of one recording.

    A step that some rank has not is left out: its sum would lack that rank's tokens. What is missing is in the notes.

    Raises:
        TraceError: a damaged file, files of different models, or no step that all ranks have.
    """
    raws = [read_trace(one.path, one.content) for one in containers]
    parts = [_part_of(raw.metadata) for raw in raws]
    if parts[0] is None:
        return raws[0]
    by_rank = {part.rank: raw for part, raw in zip(parts, raws, strict=True) if part is not None}
    ranks = sorted(by_rank)
    limit = max(MAX_BYTES, *(one.path.stat().st_size for one in containers))
    notes = [note for rank in ranks for note in _notes_of_rank(rank, by_rank[rank])]
    if len(ranks) < parts[0].num_ranks:
        notes.append(
            f"recorded by ranks {human_list(ranks)} of {parts[0].num_ranks}: what the others routed is missing; "
            "give the folder, or the files of all ranks together"
        )
    raw = raws[0] if len(ranks) == 1 else _summed([by_rank[rank] for rank in ranks], limit, notes)
    metadata = {key: value for key, value in raw.metadata.items() if key != "closing"}
    metadata["recording"] = {"id": parts[0].id, "ranks": ranks, "num_ranks": parts[0].num_ranks}
    found = f"Equipoise recording of {len(raw.logical_count)} steps, rank{'s' * (len(ranks) > 1)} {human_list(ranks)}"
    return replace(raw, metadata=metadata, found=found, notes=tuple(notes))


def _part_of(metadata: dict[str, Any]) -> _Part | None:
    part = metadata.get("recording")
    if not isinstance(part, dict):
        return None
    name, rank, num_ranks = part.get("id"), part.get("rank"), part.get("num_ranks")
    known = isinstance(name, str) and isinstance(rank, int) and isinstance(num_ranks, int)
    return _Part(name, rank, num_ranks) if known else None  # type: ignore[arg-type]


def _notes_of_rank(rank: int, raw: RawTrace) -> list[str]:
    notes = [f"rank {rank}: {note}" for note in raw.notes]
    closing = raw.metadata.get("closing")
    if closing is None:
        notes.append(f"rank {rank} did not close its file: how many steps it dropped is not known")
    elif closing.get("num_dropped"):
        pairs = [each for each in closing.get("dropped") or [] if isinstance(each, list) and len(each) == 2]
        ranges = [str(first) if first == last else f"{first}-{last}" for first, last in pairs]
        why = f": {closing['error']}" if closing.get("error") else ", its disk was slower than the steps"
        notes.append(f"rank {rank} dropped {_steps(closing['num_dropped'])} ({human_list(ranges)}){why}")
    return notes


def _summed(raws: list[RawTrace], limit: int, notes: list[str]) -> RawTrace:
    """The steps that all ranks have, summed over ranks; adds to ``notes``."""
    shapes = {raw.logical_count.shape[1:] for raw in raws}
    if len(shapes) > 1:
        raise TraceError(f"the files of one recording have (layers, experts) = {sorted(shapes)}")
    step_ids = [np.asarray(raw.forward_pass_ids) for raw in raws]
    common = reduce(np.intersect1d, step_ids)
    if not len(common):
        raise TraceError("no step was recorded by every rank")
    if left_out := len(reduce(np.union1d, step_ids)) - len(common):
        notes.append(f"{_steps(left_out)} left out: not every rank recorded them")
    rows = [np.intersect1d(ids, common, return_indices=True)[1] for ids in step_ids]
    dtype = _type_of_sum([raw.logical_count for raw in raws])
    shape = (len(common), *raws[0].logical_count.shape[1:])
    if num_bytes(shape, dtype.itemsize) > limit:
        raise TraceError(f"the sum of shape {shape} would take more than the limit of {limit >> 20} MiB")
    apart = None
    if num_bytes(shape, dtype.itemsize) * len(raws) <= MAX_BYTES:
        apart = np.empty((len(common), len(raws), *shape[1:]), dtype)
    else:
        notes.append(f"the ranks are not kept apart: that would take more than {MAX_BYTES >> 20} MiB")
    total = np.zeros(shape, dtype)
    for start in range(0, len(common), _STEPS_AT_ONCE):
        part = slice(start, start + _STEPS_AT_ONCE)
        for index, raw in enumerate(raws):
            counts = raw.logical_count[rows[index][part]]
            total[part] += counts
            if apart is not None:
                apart[part, index] = counts
    first = raws[0]
    topk_ids, token_offsets = _tokens(raws, rows, notes)
    return replace(
        first,
        topk_ids=topk_ids,
        token_offsets=token_offsets,
        logical_count=total,
        forward_pass_ids=common,
        phases=None if first.phases is None else first.phases[rows[0]],
        timestamps=None if first.timestamps is None else first.timestamps[rows[0]],
        rank_count=apart,
    )


def _tokens(
    raws: list[RawTrace], rows: list[np.ndarray], notes: list[str]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The tokens of all ranks, step by step and within a step by rank, and where each step begins."""
    if any(raw.topk_ids is None for raw in raws):
        return None, None
    if sum(raw.topk_ids.nbytes for raw in raws if raw.topk_ids is not None) > MAX_BYTES:
        notes.append(f"single tokens are left out: they would take more than {MAX_BYTES >> 20} MiB")
        return None, None
    parts, sizes = [], []
    for step in range(len(rows[0])):
        of_step = []
        for raw, row in zip(raws, rows, strict=True):
            assert raw.topk_ids is not None
            assert raw.token_offsets is not None
            ids = raw.topk_ids[raw.token_offsets[row[step]] : raw.token_offsets[row[step] + 1]]
            of_step.append(ids[(ids >= 0).any((1, 2))])  # a rank without tokens has one that chose nothing
        parts += of_step
        sizes.append(sum(len(ids) for ids in of_step))
    return np.concatenate(parts), np.cumsum([0, *sizes])


def _steps(count: Any) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def _type_of_sum(counts: Sequence[np.ndarray]) -> np.dtype:
    if any(each.dtype.kind == "f" for each in counts):
        return np.dtype(np.float64)
    return np.dtype(np.int32 if sum(int(each.max(initial=0)) for each in counts) < 2**31 else np.int64)
