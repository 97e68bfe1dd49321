"""Where a streamed recording is written: a folder for each recording, in it a trace file of each rank."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from equipoise.errors import ConfigError, StorageError
from equipoise.formats.readers.own_ranks import file_of_rank
from equipoise.formats.trace_file import TraceDescription
from equipoise.formats.trace_writer import TraceWriter
from equipoise.load.stream_report import StreamReport

MAX_RECORDINGS = 100
"""Streamed recordings that a directory may hold: a client in a loop must not fill the disk."""

_CLOSING_BYTES = 4096
_FLUSH_SECONDS = 1.0
_RECORDS_AT_ONCE = 64  # after which the serving thread may have the interpreter back


class TraceFileSink:
    """Writes the steps of one rank to its trace file.

    A crash of the process loses nothing of what it has taken, one of the machine about a second.

    Args:
        path: of a file that is not there yet.
        description: its metadata says which recording and rank it is of, see formats/readers/own_ranks.py.
        clock: seconds, monotonic.

    Raises:
        ConfigError: the file cannot be made.
    """

    def __init__(
        self, path: Path, description: TraceDescription, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.path = str(path)
        self._clock = clock
        self._writer = TraceWriter(path, description, closing_bytes=_CLOSING_BYTES)
        self._writer.flush()  # from now on a reader knows what it is
        self._flushed_at = clock()

    def append(
        self, values: np.ndarray, *, forward_pass_ids: np.ndarray, phases: np.ndarray, timestamps: np.ndarray
    ) -> None:
        """Takes records of some steps."""
        for start in range(0, len(values), _RECORDS_AT_ONCE):
            part = slice(start, start + _RECORDS_AT_ONCE)
            self._writer.append(
                values[part],
                forward_pass_ids=forward_pass_ids[part],
                phases=phases[part],
                timestamps=timestamps[part],
            )
        if self._clock() - self._flushed_at >= _FLUSH_SECONDS:
            self._writer.flush()
            self._flushed_at = self._clock()

    def close(self, report: StreamReport) -> None:
        """Closes the file; its header says from now on what was dropped."""
        error = None if report.error is None else report.error.encode("ascii", "replace").decode()[:400]
        self._writer.close({"num_dropped": report.num_dropped, "dropped": report.dropped, "error": error})


def open_trace_file(directory: str, recording: str, description: TraceDescription, rank: int) -> TraceFileSink:
    """Makes the folder ``recording`` of a directory, and in it the file of a rank.

    Raises:
        ConfigError: the directory is missing or cannot be written, or has a recording of that name.
        StorageError: the disk is full, or :data:`MAX_RECORDINGS` recordings lie there already.
    """
    parent = Path(directory).resolve()
    path = file_of_rank(parent / recording, rank)
    try:
        others = [each for each in parent.glob("expert_distribution_*/") if each != path.parent]
        if len(others) >= MAX_RECORDINGS:
            raise StorageError(
                f"dump_dir {directory!r} holds {len(others)} streamed recordings, at most {MAX_RECORDINGS} are kept: "
                "remove some"
            )
        path.parent.mkdir(exist_ok=True)  # by the first of the ranks
        path.touch(exist_ok=False)
        return TraceFileSink(path, description)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"no room for a recording in dump_dir {directory!r}: {error}") from None
        raise ConfigError(f"cannot record into dump_dir {directory!r}: {error}", field="dump_dir") from None
