"""Writes Equipoise's trace format; see :mod:`equipoise.formats.trace_file` for what it is."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from equipoise.errors import ConfigError
from equipoise.formats.container import map_tensor, read_safetensors_header
from equipoise.formats.trace_file import FORMAT, VERSION, TraceDescription, description_of, whole_records

_HEADER_ROOM = 64
"""Bytes kept free in the header for the digits of the offsets to come."""


class TraceWriter:
    """Writes a trace file, step by step; also behind what an earlier writer left.

    Args:
        path: a new file, or one of the same description to append to (what a crash cut off is taken away first).
        placements: (V, L, P) ints, for a new file.
        closing_bytes: room that a new file keeps for what :meth:`close` adds, in bytes of JSON within JSON.

    Raises:
        ConfigError: it cannot be written, or it is another trace already.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        description: TraceDescription,
        placements: np.ndarray | None = None,
        *,
        closing_bytes: int = 0,
    ):
        description.check()
        self._description = description
        self._record = description.record()
        self._path = Path(path)
        self._placements = placements
        self._closing: Mapping[str, Any] | None = None
        self._header_bytes = 0
        try:
            self._file, self._num_records = self._open(closing_bytes)
        except OSError as error:
            raise ConfigError(f"{self._path}: cannot be written: {error.strerror}", field="out") from error

    def append(
        self,
        values: np.ndarray,
        *,
        forward_pass_ids: np.ndarray,
        timestamps: np.ndarray | None = None,
        phases: np.ndarray | None = None,
        placement: int = -1,
    ) -> None:
        """Appends records; a crash of this process does not lose them, one of the machine may until :meth:`flush`.

        Args:
            values: (n, R, L, E) counts, or (n, L, K) ids.
            forward_pass_ids: (n,); of a trace of tokens, equal for the tokens of a step.
        """
        records = np.zeros(len(values), dtype=self._record)
        records["forward_pass_id"] = forward_pass_ids
        records["timestamp"] = np.nan if timestamps is None else timestamps
        records["phase"] = 0 if phases is None else phases
        records["placement"] = placement
        records["topk_ids" if self._description.tokens else "counts"] = values
        _seal(records)
        self._file.write(records.tobytes())
        self._file.flush()
        self._num_records += len(records)

    def flush(self) -> None:
        """Makes what was appended visible to any safetensors reader and safe from a crash."""
        self._file.flush()
        os.fsync(self._file.fileno())
        end = self._file.tell()
        self._file.seek(0)
        self._file.write(self._header(self._num_records))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.seek(end)

    def close(self, closing: Mapping[str, Any] | None = None) -> None:
        """Closes the file.

        Args:
            closing: JSON values that hold for the whole file and were not known before; at most ``closing_bytes`` long.
        """
        self._closing = closing
        try:
            self.flush()
        finally:
            self._file.close()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _open(self, closing_bytes: int) -> tuple[BinaryIO, int]:
        if self._path.is_file() and self._path.stat().st_size:
            return self._reopen()
        room = len(self._encoded(0)) + _HEADER_ROOM + closing_bytes
        self._header_bytes = -(-room // 8) * 8  # the data begins at a multiple of 8
        file = self._path.open("w+b")
        file.write(self._header(0))
        if self._placements is not None:
            file.write(self._placements.astype("<i4").tobytes())
        return file, 0

    def _reopen(self) -> tuple[BinaryIO, int]:
        header = read_safetensors_header(self._path)
        if header.metadata.get("format") != FORMAT or description_of(header) != self._description:
            raise ConfigError(f"{self._path} is there already and holds something else", field="out")
        if "placements" in header.tensors:
            self._placements = np.array(map_tensor(self._path, header, "placements"))
        self._header_bytes = header.data_start - 8
        records = whole_records(self._path, header, self._record)
        count = len(records)
        start = header.data_start + header.tensors["steps"]["data_offsets"][0]
        del records
        file = self._path.open("r+b")
        file.truncate(start + count * self._record.itemsize)
        file.seek(0, os.SEEK_END)
        return file, count

    def _header(self, num_records: int) -> bytes:
        encoded = self._encoded(num_records)
        assert len(encoded) <= self._header_bytes, "more to add than was kept room for"
        return struct.pack("<Q", self._header_bytes) + encoded.ljust(self._header_bytes)

    def _encoded(self, num_records: int) -> bytes:
        start = 0 if self._placements is None else 4 * self._placements.size
        size = self._record.itemsize
        about = {
            "format": FORMAT,
            "version": VERSION,
            "description": json.dumps(asdict(self._description), sort_keys=True),
        }
        if self._closing is not None:
            about["closing"] = json.dumps(self._closing)
        content: dict[str, Any] = {"__metadata__": about}
        if self._placements is not None:
            content["placements"] = {"dtype": "I32", "shape": list(self._placements.shape), "data_offsets": [0, start]}
        steps = {"dtype": "U8", "shape": [num_records, size], "data_offsets": [start, start + num_records * size]}
        return json.dumps({**content, "steps": steps}).encode()


def _seal(records: np.ndarray) -> None:
    for index in range(len(records)):
        records["crc"][index] = zlib.crc32(records[index].tobytes()[:-4])
