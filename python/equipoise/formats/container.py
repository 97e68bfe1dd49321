"""What kind of file a path is: its container found by content, opened once, nothing executed."""

from __future__ import annotations

import json
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from equipoise.errors import TraceError
from equipoise.formats.archive import array_names, open_archive, require_regular_file
from equipoise.formats.text import TextKind, open_text

Kind = Literal["npz", "torch", "npy", "safetensors"] | TextKind

_MAX_HEADER = 100 << 20  # the limit of safetensors' own reader


@dataclass(frozen=True)
class Container:
    """A file whose kind is known, with what a reader looks at.

    ============  ==========================================================
    npz           :class:`zipfile.ZipFile`
    torch         what ``torch.save`` wrote: tensors and plain values
    npy           a memory-mapped array
    safetensors   :class:`SafetensorsHeader`
    json, yaml    plain values
    jsonl         list of plain values, one a line
    csv           list of rows, each a list of strings
    ============  ==========================================================
    """

    path: Path
    kind: Kind
    content: Any = field(repr=False)

    @property
    def names(self) -> set[str]:
        """Names of what it holds: arrays of an archive, keys of a mapping."""
        if self.kind == "npz":
            return array_names(self.content)
        if self.kind == "safetensors":
            return set(self.content.tensors)
        if isinstance(self.content, dict):
            return {str(key) for key in self.content}
        return set()


@dataclass(frozen=True)
class SafetensorsHeader:
    """The parsed header of a safetensors file."""

    metadata: dict[str, str]
    tensors: dict[str, dict[str, Any]]  # name -> dtype, shape, data_offsets
    data_start: int


def open_container(path: Path) -> Container:
    """Finds out what a file is and opens it.

    Raises:
        TraceError: missing, empty, damaged, too large, or of no kind that is known. The message does not name the
            file: the caller does.
    """
    require_regular_file(path)
    with path.open("rb") as file:
        head = file.read(16)
    if head[:4] == b"PK\x03\x04":
        return _open_zip(path)
    if head[:6] == b"\x93NUMPY":
        return Container(path, "npy", _map_npy(path))
    if len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= _MAX_HEADER:
        return Container(path, "safetensors", read_safetensors_header(path))
    kind, content = open_text(path)
    return Container(path, kind, content)


def _open_zip(path: Path) -> Container:
    archive = open_archive(path)
    if array_names(archive):
        return Container(path, "npz", archive)
    archive.close()
    if not any(name.endswith("data.pkl") for name in archive.namelist()):
        raise TraceError("a zip archive, but neither an .npz file nor one that torch.save wrote")
    return Container(path, "torch", load_torch_file(path))


def load_torch_file(path: Path) -> Any:
    """What ``torch.save`` wrote, tensors mapped and not read; code in it never runs (``weights_only=True``).

    Raises:
        TraceError: too large, damaged, or asks for something other than tensors and plain values.
    """
    try:
        with open_archive(path) as archive:  # checks the unpacked size, which torch.load does not
            damaged = archive.testzip()  # nor does it compare checksums
            mapped = all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        if damaged is not None:
            raise TraceError(f"the archive is damaged: member {damaged!r} does not match its checksum")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except TraceError:
        raise
    except Exception as error:  # a hostile pickle can raise anything
        reason = "it holds objects other than tensors and plain values" if "nsupported" in str(error) else "damaged"
        raise TraceError(f"torch.load refuses the file: {reason} ({type(error).__name__})") from None


def _map_npy(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise TraceError(f"a .npy file that is truncated or damaged ({' '.join(str(error).split())[:120]})") from None
    if array.dtype.kind not in "iuf":
        raise TraceError(f"a .npy file must hold numbers, got dtype {array.dtype}")
    return array


def read_safetensors_header(path: Path) -> SafetensorsHeader:
    """Parses the header; whether the data behind it is whole, whoever reads it checks.

    Raises:
        TraceError: the header is damaged.
    """
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        raw = file.read(length)
    if len(raw) != length:
        raise TraceError("a safetensors file that ends inside its header")
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", {})
        tensors: dict[str, dict[str, Any]] = {
            str(name): {
                "dtype": str(entry["dtype"]),
                "shape": [int(size) for size in entry["shape"]],
                "data_offsets": [int(offset) for offset in entry["data_offsets"]],
            }
            for name, entry in header.items()
        }
        metadata = {str(key): str(value) for key, value in metadata.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise TraceError(f"a safetensors file with a damaged header ({type(error).__name__})") from None
    for name, entry in tensors.items():
        if any(size < 0 for size in entry["shape"]) or len(entry["data_offsets"]) != 2:
            raise TraceError(f"a safetensors file with a damaged header (tensor {name!r})")
    return SafetensorsHeader(metadata, tensors, 8 + length)


_DTYPES = {
    "I8": np.int8, "U8": np.uint8, "I16": np.int16, "U16": np.uint16, "I32": np.int32, "U32": np.uint32,
    "I64": np.int64, "U64": np.uint64, "F32": np.float32, "F64": np.float64, "F16": np.float16,
}  # fmt: skip


def map_tensor(path: Path, header: SafetensorsHeader, name: str) -> np.ndarray:
    """A tensor of a safetensors file, memory-mapped and read-only.

    Raises:
        TraceError: missing, of a type that is no number here, or not wholly in the file.
    """
    if name not in header.tensors:
        raise TraceError(f"tensor {name!r} is missing")
    entry = header.tensors[name]
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise TraceError(f"tensor {name!r} has the type {entry['dtype']}, which holds no counts")
    shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
    size = int(np.prod([float(each) for each in shape])) * np.dtype(dtype).itemsize
    if not 0 <= start <= end or end - start != size or header.data_start + end > path.stat().st_size:
        raise TraceError(f"tensor {name!r} of shape {shape} is not wholly in the file: truncated or damaged")
    if size == 0:
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=header.data_start + start, shape=shape)
