"""Equipoise's trace format, version 1: a safetensors file whose last tensor grows, one record a step.

::

    header (padded, rewritten in place)   __metadata__: format, version, description (JSON, see TraceDescription), and
                                          once closed, where its writer had something to add, closing (JSON)
    placements      int32  (V, L, P)      which expert each slot held; absent where unknown
    steps           uint8  (T, record)    the records, to the end of the file

A record, little-endian, unpadded: ``forward_pass_id`` int64, ``timestamp`` float64 (seconds; NaN unknown), ``phase``
int32 (see raw_trace.PHASE_NAMES), ``placement`` int32 (row of ``placements``; -1 unknown), ``counts`` int32 or int64
or float64 (R, L, E), R source ranks or 1 for all together; or, in a trace of tokens, where a record is a token,
``topk_ids`` int16 or int32 (L, K) in place of counts; then ``crc`` uint32 over what comes before it in the record.

Whoever appends writes records first and the header after them. So a reader goes by the length of the file, not by the
header's T: a file that was cut off opens up to its last whole record whose checksum holds (of tokens: to the last whole
step). A file that was closed is plain safetensors to any other reader. Reading maps the file; nothing is copied.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.errors import TraceError
from equipoise.formats.archive import MAX_EXPERTS
from equipoise.formats.container import SafetensorsHeader

FORMAT = "equipoise.trace"
VERSION = "1"

_COUNT_TYPES = {"i4": "<i4", "i8": "<i8", "f8": "<f8"}
_ID_TYPES = {"i2": "<i2", "i4": "<i4"}


@dataclass(frozen=True)
class TraceDescription:
    """What holds for all steps of a trace file; its JSON is in the header."""

    num_layers: int
    num_logical_experts: int
    source_ranks: int = 1  # R
    count_type: str = "i4"  # i4, i8 or f8
    top_k: int | None = None
    tokens: bool = False  # records are tokens
    id_type: str = "i2"  # of tokens: i2 or i4
    layer_ids: list[int] | None = None  # of the model, where they are not 0, 1, 2, ...
    model: str | None = None
    topology: dict[str, int] | None = None  # num_ranks, num_nodes, slots_per_rank
    metadata: dict[str, Any] = field(default_factory=dict)

    def record(self) -> np.dtype:
        body: tuple[str, str, tuple[int, ...]]
        if self.tokens:
            body = ("topk_ids", _ID_TYPES[self.id_type], (self.num_layers, self.top_k or 1))
        else:
            shape = (self.source_ranks, self.num_layers, self.num_logical_experts)
            body = ("counts", _COUNT_TYPES[self.count_type], shape)
        head = [("forward_pass_id", "<i8"), ("timestamp", "<f8"), ("phase", "<i4"), ("placement", "<i4")]
        return np.dtype([*head, body, ("crc", "<u4")])

    def check(self) -> None:
        """
        Raises:
            TraceError: a field that cannot be.
        """
        sizes = (self.num_layers, self.num_logical_experts, self.source_ranks, self.top_k or 1)
        if not all(isinstance(size, int) and 0 < size <= MAX_EXPERTS for size in sizes):
            raise TraceError(f"layers, experts, source ranks and top_k must be in [1, {MAX_EXPERTS}], got {sizes}")
        if self.count_type not in _COUNT_TYPES or self.id_type not in _ID_TYPES:
            raise TraceError(f"unknown type of counts {self.count_type!r} or ids {self.id_type!r}")
        if self.layer_ids is not None and (
            not isinstance(self.layer_ids, list) or len(self.layer_ids) != self.num_layers
        ):
            raise TraceError(f"layer_ids must be {self.num_layers} numbers")
        if not isinstance(self.metadata, dict):
            raise TraceError("metadata must be a JSON object")
        if self.record().itemsize > 1 << 30:
            raise TraceError(f"a record would take {self.record().itemsize} bytes")


def description_of(header: SafetensorsHeader) -> TraceDescription:
    """
    Raises:
        TraceError: another version, or a damaged description.
    """
    if header.metadata.get("version") != VERSION:
        raise TraceError(
            f"version {header.metadata.get('version')!r} of the format; this program reads version {VERSION}"
        )
    try:
        description = TraceDescription(**json.loads(header.metadata["description"]))
        description.check()
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, TraceError):
            raise
        raise TraceError(f"a damaged description ({type(error).__name__})") from None
    return description


def closing_of(header: SafetensorsHeader) -> dict[str, Any] | None:
    """What the writer added when it closed the file; None if it added nothing, or did not close it."""
    try:
        closing = json.loads(header.metadata.get("closing", "null"))
    except (ValueError, RecursionError):
        return None
    return closing if isinstance(closing, dict) else None


def whole_records(path: Path, header: SafetensorsHeader, dtype: np.dtype) -> np.ndarray:
    """The records up to the first that was not wholly written, memory-mapped."""
    entry = header.tensors.get("steps", {})
    if entry.get("dtype") != "U8" or len(entry.get("shape", ())) != 2 or entry["shape"][1] != dtype.itemsize:
        raise TraceError("tensor 'steps' does not fit its description")
    start = header.data_start + entry["data_offsets"][0]
    count = max(0, path.stat().st_size - start) // dtype.itemsize
    if count == 0:
        return np.zeros(0, dtype)
    records = np.memmap(path, dtype=dtype, mode="r", offset=start, shape=(count,))
    # A page that never reached the disk leaves zeros or older bytes: whole records end where a checksum fails. Those
    # that the header counts were synced before it was written; the last of them still has to hold.
    settled = min(entry["shape"][0], count)
    for index in range(max(0, settled - 1), count):
        if zlib.crc32(records[index].tobytes()[:-4]) != records["crc"][index]:
            return records[:index]
    return records
