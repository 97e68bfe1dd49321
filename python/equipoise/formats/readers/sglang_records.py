"""SGLang's per_pass and per_token dumps: the records of all ranks put together to one trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from equipoise.errors import TraceError
from equipoise.formats.archive import MAX_EXPERTS, require_size
from equipoise.formats.container import Container
from equipoise.formats.numbers import as_numbers, exact_sum, human_list, require_integer, to_logical_count
from equipoise.formats.raw_trace import RawTrace, ReadOptions
from equipoise.formats.readers.padding import without_padding
from equipoise.formats.readers.sglang import describe_ranks, one_sided

_MAX_FORWARD_MODE = 3  # EXTEND, DECODE, MIXED; what lies above is idle or speculative


@dataclass(frozen=True, eq=False)
class _Record:
    pass_id: int
    source: tuple[int, str]  # rank, gatherer
    count: np.ndarray  # (L, P) int64
    phase: int


def read_records(containers: Sequence[Container], _options: ReadOptions) -> RawTrace:
    """The per_pass or per_token dumps of one recording, in any number of files.

    Records of one forward pass are summed over ranks and gatherers. A pass that some rank did not record (the edges of
    a recording) is dropped: its sum would show that rank's experts as idle. Passes without a token are dropped too.
    Both are said in the notes.

    Raises:
        TraceError: two records for the same pass, rank and gatherer, or files of different placements.
    """
    p2l = _common_map([one.content["last_physical_to_logical_map"] for one in containers])
    padding: Counter[str] = Counter()
    records = [record for one in containers for record in _records_of(one.content["records"], p2l.shape, padding)]
    by_pass: dict[int, list[_Record]] = {}
    for record in records:
        others = by_pass.setdefault(record.pass_id, [])
        if any(other.source == record.source for other in others):
            rank, gatherer = record.source
            raise TraceError(f"two records of forward pass {record.pass_id} from rank {rank} (gatherer {gatherer})")
        others.append(record)
    every_source = {record.source for record in records}
    complete = {pass_id: found for pass_id, found in by_pass.items() if len(found) == len(every_source)}
    sums = {pass_id: exact_sum(np.stack([r.count for r in found])) for pass_id, found in sorted(complete.items())}
    used = [pass_id for pass_id, total in sums.items() if total.any()]
    ranks = sorted({rank for rank, _ in every_source})
    if not used:
        raise TraceError("no forward pass with a token in it was recorded by every rank")
    physical = np.stack([sums[pass_id] for pass_id in used])
    notes = [*one_sided(physical, ranks)]
    if missing := len(by_pass) - len(complete):
        notes.append(
            f"{missing} of {len(by_pass)} forward passes are left out: not every one of the ranks {human_list(ranks)} "
            "recorded them"
        )
    if idle := len(complete) - len(used):
        notes.append(f"{idle} forward passes without a token are left out")
    if padding:
        notes.append(f"{sum(padding.values())} padding ids are not counted (a token names no expert twice)")
    per_token = any("topk_ids_of_layer" in r for one in containers for r in one.content["records"][:1])
    phases = np.array([complete[pass_id][0].phase for pass_id in used])
    return RawTrace(
        to_logical_count(physical, p2l, int(p2l.max()) + 1),
        np.array(used),
        physical,
        p2l,
        metadata={
            "source": "sglang per_token" if per_token else "sglang per_pass",
            "ranks": ranks,
            "incomplete_passes_dropped": missing,
        },
        phases=phases if phases.any() else None,
        found=f"SGLang {'per_token' if per_token else 'per_pass'} dump of {describe_ranks(ranks)}",
        notes=tuple(notes),
    )


def same_recording(left: Container, right: Container) -> bool:
    """Whether two dumps belong together: one placement, and other ranks (of passes that they share) or other passes."""
    try:
        maps = [as_numbers(one.content["last_physical_to_logical_map"], "map", 2) for one in (left, right)]
    except TraceError:
        return False
    if maps[0].shape != maps[1].shape or (maps[0] != maps[1]).any():
        return False
    mine, theirs = (_passes_by_rank(one.content["records"]) for one in (left, right))
    shared = set().union(*mine.values()) & set().union(*theirs.values()) if mine and theirs else set()
    return bool(shared) and not (mine.keys() & theirs.keys())


def _passes_by_rank(records: Any) -> dict[Any, set[Any]]:
    found: dict[Any, set[Any]] = {}
    for record in records if isinstance(records, list) else []:
        if isinstance(record, dict) and isinstance(record.get("rank"), int):
            pass_id = record.get("forward_pass_id")
            found.setdefault(record["rank"], set()).add(pass_id if isinstance(pass_id, int) else None)
    return found


def _records_of(records: Any, shape: tuple[int, ...], padding: Counter[str]) -> list[_Record]:
    if not isinstance(records, list):
        raise TraceError(f"records must be a list, got {type(records).__name__}")
    require_size("global_physical_count", (len(records), *shape))
    return [_record(record, index, shape, padding) for index, record in enumerate(records)]


def _record(record: Any, index: int, shape: tuple[int, ...], padding: Counter[str]) -> _Record:
    """One record; keys beyond those that are needed are ignored."""
    needed = {"forward_pass_id", "rank", "global_physical_count"}
    if not isinstance(record, dict) or not needed <= record.keys():
        raise TraceError(f"records[{index}] must have the keys {sorted(needed)}")
    pass_id = require_integer(record["forward_pass_id"], f"records[{index}].forward_pass_id")
    rank = require_integer(record["rank"], f"records[{index}].rank")
    name = f"records[{index}].global_physical_count"
    count = as_numbers(record["global_physical_count"], name, 2)
    if count.shape != shape:
        raise TraceError(f"{name} has shape {count.shape}, last_physical_to_logical_map has {shape}")
    if count.dtype.kind == "f" or count.min() < 0:
        raise TraceError(f"{name} must hold whole numbers of at least 0")
    mode = record.get("forward_mode")
    phase = mode if isinstance(mode, int) and 0 < mode <= _MAX_FORWARD_MODE else 0
    count = _without_padding(count.astype(np.int64), record.get("topk_ids_of_layer"), padding)
    return _Record(pass_id, (rank, str(record.get("gatherer_key", "primary"))[:64]), count, phase)


def _without_padding(count: np.ndarray, topk: Any, padding: Counter[str]) -> np.ndarray:
    """The counts less the ids that only fill up a token's row; per_token dumps say which."""
    if topk is None:
        return count
    try:
        ids = as_numbers(topk, "topk_ids_of_layer", 3, experts_last=False)
    except TraceError:
        return count  # SGLang writes it empty for a pass without tokens
    if ids.dtype.kind == "f" or ids.shape[0] != count.shape[0] or ids.max() >= count.shape[1]:
        return count
    if not np.array_equal(_counted(ids, count.shape[1]), count):
        return count  # not the ids of this count
    kept, dropped = without_padding(np.swapaxes(ids, 0, 1))
    if not dropped:
        return count
    padding["ids"] += dropped
    return _counted(np.swapaxes(kept, 0, 1), count.shape[1])


def _counted(ids: np.ndarray, num_slots: int) -> np.ndarray:
    """(L, P) int64: how often each slot is named in (L, tokens, K) ids; negative ones are not counted."""
    return np.stack([np.bincount(row[row >= 0], minlength=num_slots) for row in ids])


def _common_map(values: Sequence[Any]) -> np.ndarray:
    maps = [as_numbers(value, "last_physical_to_logical_map", 2) for value in values]
    first = maps[0]
    if any(other.shape != first.shape or (other != first).any() for other in maps[1:]):
        raise TraceError("the files do not agree on last_physical_to_logical_map: they are of different recordings")
    if first.dtype.kind == "f" or first.min() < 0 or first.max() >= MAX_EXPERTS:
        raise TraceError(f"last_physical_to_logical_map must hold expert ids in [0, {MAX_EXPERTS})")
    return first.astype(np.int64)
