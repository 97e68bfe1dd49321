"""Zip archives of arrays (.npz, torch.save) from people we do not know: nothing is unpacked before its size is known.

An archive names the unpacked size of each member, and an array its shape, before any data comes. Both are held
against MAX_BYTES first, so a few kilobytes cannot ask for terabytes; nothing here ever unpickles.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from equipoise.errors import TraceError

MAX_BYTES = 2 << 30
"""Most bytes that packed content may take in memory: 18 000 steps of DeepSeek-V3 (58 layers of 256 experts). Content
that lies unpacked in its file, as torch.save writes it, may be as large as the file is: it asks for nothing more."""

MAX_EXPERTS = 1 << 16
"""Most experts of a layer. An id above it is garbage, and would make a count array of its size."""


def require_regular_file(path: Path) -> None:
    """Raises TraceError unless ``path`` is a file with something in it (no directory, device or pipe)."""
    if not path.exists():
        raise TraceError("no such file")
    if path.is_dir():
        raise TraceError("is a directory, not a file")
    if not path.is_file():
        raise TraceError("is not a regular file")
    if path.stat().st_size == 0:
        raise TraceError("the file is empty")


def require_size(what: str, shape: tuple[int, ...], itemsize: int = 8) -> None:
    """Raises TraceError if an array of this shape would take more than MAX_BYTES."""
    if min(shape, default=0) < 0 or math.prod(shape) * itemsize > MAX_BYTES:
        raise TraceError(f"{what} of shape {shape} would take more than the limit of {MAX_BYTES >> 20} MiB")


def open_archive(path: Path) -> zipfile.ZipFile:
    """The archive, once its members' declared sizes have been checked.

    Raises:
        TraceError: not a whole zip archive, or larger than MAX_BYTES when unpacked. The message does not name the
            file: the caller does.
    """
    require_regular_file(path)
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"PK\x03\x04":
        raise TraceError("neither an .npz file nor a torch.save file of today's zip format")
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise TraceError(f"the archive is truncated or damaged ({error})") from None
    try:
        for member in archive.infolist():
            # A damaged name would pass for a file of another kind: opening compares it with the member's own header.
            archive.open(member).close()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        archive.close()
        raise TraceError(f"the archive is truncated or damaged ({error})") from None
    unpacked = sum(info.file_size for info in archive.infolist())
    if unpacked > max(MAX_BYTES, path.stat().st_size):
        archive.close()
        raise TraceError(f"{unpacked} bytes when unpacked, more than the limit of {MAX_BYTES >> 20} MiB")
    return archive


def array_names(archive: zipfile.ZipFile) -> set[str]:
    return {name[:-4] for name in archive.namelist() if name.endswith(".npy")}


def read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array of numbers of an .npz file.

    Raises:
        TraceError: the member is missing or damaged, holds Python objects or text, or has another size than its
            shape declares.
    """
    try:
        info = archive.getinfo(f"{name}.npy")
    except KeyError:
        raise TraceError(f"array {name!r} is missing") from None
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version not in ((1, 0), (2, 0)):
            raise TraceError(f"array {name!r} has the unknown .npy version {version}")
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(member)
        if dtype.kind not in "iuf":
            raise TraceError(f"array {name!r} must hold numbers, got dtype {dtype}")
        require_size(f"array {name!r}", shape, dtype.itemsize)
        num_bytes = math.prod(shape) * dtype.itemsize
        data = member.read(num_bytes)
        if len(data) != num_bytes or member.read(1):
            raise TraceError(f"array {name!r} of shape {shape} should take {num_bytes} bytes and does not")
    return np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if fortran_order else "C")


def read_json(archive: zipfile.ZipFile, name: str) -> Any:
    """A JSON value stored as an array of UTF-8 bytes."""
    return json.loads(read_array(archive, name).astype(np.uint8).tobytes().decode())


def write_archive(file: BinaryIO, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes an .npz whose member ``header`` is JSON. The same content gives the same bytes."""
    encoded = np.frombuffer(json.dumps(header, sort_keys=True).encode(), dtype=np.uint8)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in {"header": encoded, **arrays}.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
            member = zipfile.ZipInfo(f"{name}.npy")  # its date is fixed, unlike that of writestr(name)
            # Level 1: a dump waits for this, and counts are small numbers that pack well at any level.
            archive.writestr(member, buffer.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=1)
