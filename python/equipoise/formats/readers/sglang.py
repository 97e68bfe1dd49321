"""SGLang's recorder dumps (``torch.save``): stat, per_pass and per_token, as of SGLang 0.5.23.

stat (and stat_approx): ``{"rank", "logical_count": int32 (steps, L, E), "average_utilization_rate_over_window"}``.
``logical_count`` is already summed over the ranks. It is the recorder's ring buffer as it lies: rows that were never
written are zero.

per_pass: ``{"records": [{"forward_pass_id", "rank", "gatherer_key", "global_physical_count": int32 (L, P)}],
"last_physical_to_logical_map": int (L, P)}``. Every rank writes a file of its own, in which it counts only what it saw
itself: the load of a pass is the sum over ranks. per_token: the same with ``topk_ids_of_layer`` (L, tokens, 8) slots,
-1 for none, and ``forward_mode`` beside each count.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from equipoise.errors import TraceError
from equipoise.formats.container import Container
from equipoise.formats.numbers import as_counts, as_numbers, human_list
from equipoise.formats.raw_trace import RawTrace, ReadOptions


def is_stat(container: Container) -> bool:
    return container.kind == "torch" and {"logical_count", "rank"} <= container.names


def read_stat(container: Container, _options: ReadOptions) -> RawTrace:
    """A stat dump: steps in the order of the ring, unwritten (all-zero) rows dropped.

    The counts stay where torch mapped them: rows are put in order in place, so a dump is held once.
    """
    pack: dict[str, Any] = container.content
    counts = as_counts(as_numbers(pack["logical_count"], "logical_count", (2, 3)), "logical_count")
    counts = counts[None] if counts.ndim == 2 else counts
    metadata: dict[str, Any] = {"source": "sglang stat"}
    utilization = pack.get("average_utilization_rate_over_window")
    if isinstance(utilization, float):
        metadata["average_utilization_rate_over_window"] = utilization
    written = np.array([bool(row.any()) for row in counts])
    if not written.any():
        raise TraceError("logical_count holds no step with a token in it")
    start, known = oldest_row(written)
    notes = []
    if not known:
        notes.append("the ring is full: where it was overwritten is not in the file, so its oldest step is not known")
    elif start:
        notes.append(f"the recording begins at row {start} of the ring and wraps round")
    dropped = int((~written).sum())
    if dropped:
        notes.append(f"{dropped} of {len(written)} rows hold no token (never written, or idle) and are left out")
    return RawTrace(
        rows_in_order(counts, written, start), metadata=metadata, found="SGLang stat dump", notes=tuple(notes)
    )


def oldest_row(written: np.ndarray) -> tuple[int, bool]:
    """Where the ring starts, and whether that is known.

    SGLang's reset clears the ring but not its write position, so a second recording begins in the middle and may wrap
    round. Row 0 written and the last row not: it never wrapped, however long it was idle in between. Else it begins
    behind the longest stretch of unwritten rows. A ring without a gap was overwritten at an unknown place.
    """
    filled = np.flatnonzero(written)
    if not len(filled) or len(filled) == len(written):
        return 0, len(filled) == 0
    if written[0] and not written[-1]:
        return 0, True
    gap_before = np.diff(filled, prepend=filled[-1] - len(written))  # cyclic distance to the previous written row
    return int(filled[np.argmax(gap_before)]), True


def rows_in_order(ring: np.ndarray, written: np.ndarray, start: int) -> np.ndarray:
    """The written rows of a ring from row ``start`` on, without a second copy of it where there is a way.

    A stretch of rows is a view. Else rows trade places in the mapped pages themselves: torch maps them privately, so
    the file does not change, and a gigabyte stays one.
    """
    filled = np.flatnonzero(written)
    if start == 0 and len(filled) == filled[-1] - filled[0] + 1:
        return ring[filled[0] : filled[-1] + 1]
    if not ring.flags.writeable:
        order = (np.arange(len(ring)) + start) % len(ring)
        return ring[order[written[order]]]
    _rotate(ring, start)
    for to, row in enumerate(np.flatnonzero(np.roll(written, -start)).tolist()):
        if to != row:
            ring[to] = ring[row]  # row > to: nothing is overwritten that is still to be read
    return ring[: len(filled)]


def _rotate(rows: np.ndarray, start: int) -> None:
    """``np.roll(rows, -start, 0)`` in place: a rotation is three reversals."""
    for low, high in ((0, start), (start, len(rows)), (0, len(rows))):
        for left, right in zip(range(low, (low + high) // 2), range(high - 1, low - 1, -1), strict=False):
            kept = rows[left].copy()
            rows[left] = rows[right]
            rows[right] = kept


def is_records(container: Container) -> bool:
    return container.kind == "torch" and {"records", "last_physical_to_logical_map"} <= container.names


def one_sided(physical: np.ndarray, ranks: list[int]) -> list[str]:
    """What a recording of a single rank may lack, a sentence each."""
    if len(ranks) > 1:
        return []
    notes = [
        f"recorded by ranks {ranks} only: what other ranks routed is missing, unless there was only one; "
        "give the files of all ranks together"
    ]
    used = np.flatnonzero(physical.any((0, 1)))
    num_slots = physical.shape[2]
    if len(used) and (used[-1] - used[0] + 1) * 2 <= num_slots:
        notes.append(
            f"only slots {used[0]} to {used[-1]} of {num_slots} have load: this is one rank's part, not a workload"
        )
    return notes


def describe_ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"{len(ranks)} ranks ({human_list(ranks, 4)})"
