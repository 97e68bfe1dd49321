"""LoadTrace: recorded expert load, with a file format of its own that also opens the neighbours' files.

The file is an .npz (a zip of plain arrays: numpy.load reads it) whose member ``header`` is JSON as UTF-8 bytes:
``{"format": "equipoise.load_trace", "version": 1, "arrays": [...], "metadata": {...}}``. The other members are the
array fields below that ``arrays`` lists, in the smallest signed integers that hold them. Nothing is ever unpickled.
"""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.errors import TraceError
from equipoise.formats.archive import (
    MAX_EXPERTS,
    array_names,
    open_archive,
    read_array,
    read_json,
    require_size,
    write_archive,
)
from equipoise.formats.atomic_file import write_whole
from equipoise.formats.raw_trace import RawTrace
from equipoise.formats.sglang import load_torch_file, read_per_pass, read_stat
from equipoise.formats.tokens import read_frequency_trace, read_token_trace

FORMAT = "equipoise.load_trace"
VERSION = 1


@dataclass(frozen=True, eq=False)
class LoadTrace:
    """Tokens per logical expert, layer and step, oldest step first.

    Attributes:
        logical_count: (T, L, E) int64. A token that chose K experts counts K times, once for each. T may be 0.
        forward_pass_ids: (T,) int64, the engine's number of each step; 0, 1, 2, ... if not given.
        physical_count: (T, L, P) int64 tokens per slot, or None where only logical counts were recorded.
        physical_to_logical_map: (L, P) int64, the placement at the end of the recording, or None.
        metadata: JSON values: where the trace comes from (``source``) and whatever its writer adds.

    Raises:
        TraceError: a field has the wrong shape, or a count is negative, NaN or not a whole number.
    """

    logical_count: np.ndarray
    forward_pass_ids: np.ndarray = None  # type: ignore[assignment]  # replaced in __post_init__
    physical_count: np.ndarray | None = None
    physical_to_logical_map: np.ndarray | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = _whole_numbers(self.logical_count, "logical_count", 3)
        num_steps, num_layers, num_experts = counts.shape
        if not (num_layers and 0 < num_experts <= MAX_EXPERTS):
            raise TraceError(f"logical_count must have layers and experts, got shape {counts.shape}")
        ids = np.arange(num_steps) if self.forward_pass_ids is None else self.forward_pass_ids
        ids = _whole_numbers(ids, "forward_pass_ids", 1)
        _require_shape("forward_pass_ids", ids.shape, (num_steps,))
        object.__setattr__(self, "logical_count", counts)
        object.__setattr__(self, "forward_pass_ids", ids)
        if self.physical_count is not None:
            physical = _whole_numbers(self.physical_count, "physical_count", 3)
            _require_shape("physical_count", physical.shape, (num_steps, num_layers, physical.shape[2]))
            object.__setattr__(self, "physical_count", physical)
        if self.physical_to_logical_map is not None:
            p2l = _whole_numbers(self.physical_to_logical_map, "physical_to_logical_map", 2)
            num_slots = p2l.shape[1] if self.physical_count is None else self.physical_count.shape[2]
            _require_shape("physical_to_logical_map", p2l.shape, (num_layers, num_slots))
            if p2l.size and p2l.max() >= num_experts:
                raise TraceError(f"physical_to_logical_map holds expert {p2l.max()} of {num_experts} logical experts")
            object.__setattr__(self, "physical_to_logical_map", p2l)

    @property
    def num_steps(self) -> int:
        return self.logical_count.shape[0]

    @property
    def num_layers(self) -> int:
        return self.logical_count.shape[1]

    @property
    def num_logical_experts(self) -> int:
        return self.logical_count.shape[2]

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, tokens_per_step: int = 128, num_logical_experts: int | None = None
    ) -> LoadTrace:
        """Reads recorded load, whatever wrote it; the content decides, not the file name.

        Known are our own dumps; SGLang's stat and per_pass dumps, all-zero steps dropped, where a directory stands for
        the per_pass files of all ranks; npz files of single tokens (``topk``) or of subjects (``freq``).

        Args:
            path: the file, or the directory of per_pass files.
            tokens_per_step: for single tokens: how many consecutive ones make a step.
            num_logical_experts: for single tokens: E, where the highest id seen might be smaller.

        Raises:
            TraceError: the file is missing, damaged, too large, hostile or of no known kind; the message names it.
        """
        target = Path(path)
        try:
            raw = _read(target, tokens_per_step, num_logical_experts)
            return cls(
                raw.logical_count,
                raw.forward_pass_ids,  # type: ignore[arg-type]
                raw.physical_count,
                raw.physical_to_logical_map,
                raw.metadata,
            )
        except TraceError as error:
            raise TraceError(f"trace {target}: {error}", field="trace") from None
        except OSError as error:
            raise TraceError(f"trace {target}: cannot be read: {error.strerror or error}", field="trace") from None
        except Exception as error:  # the parsers below us raise many types for damaged bytes
            reason = " ".join(str(error).split())[:200]
            raise TraceError(
                f"trace {target}: truncated or damaged ({type(error).__name__}: {reason})", field="trace"
            ) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the trace, whole or not at all.

        Raises:
            OSError: the file cannot be written.
            TraceError: the metadata is not JSON.
        """
        arrays = {
            name: _narrowed(array)
            for name in ("logical_count", "forward_pass_ids", "physical_count", "physical_to_logical_map")
            if (array := getattr(self, name)) is not None
        }
        header = {"format": FORMAT, "version": VERSION, "arrays": sorted(arrays), "metadata": self.metadata}
        try:
            with write_whole(path) as file:
                write_archive(file, header, arrays)
        except (TypeError, ValueError) as error:
            raise TraceError(f"trace {Path(path)}: metadata is not JSON: {error}", field="metadata") from error


def _read(path: Path, tokens_per_step: int, num_logical_experts: int | None) -> RawTrace:
    if path.is_dir():
        files = sorted(path.glob("*.pt"))
        if not files:
            raise TraceError("is a directory without .pt files; name a file, or a directory of per_pass dumps")
        return read_per_pass([_per_pass_pack(file) for file in files])
    with open_archive(path) as archive:
        names = array_names(archive)
        if "header" in names:
            return _read_own(archive)
        if "topk" in names:
            return read_token_trace(archive, tokens_per_step, num_logical_experts)
        if "freq" in names:
            return read_frequency_trace(archive)
        if names:
            raise TraceError(f"an .npz file needs `topk` or `freq`, this one has {sorted(names)[:8]}")
        if not any(name.endswith("data.pkl") for name in archive.namelist()):
            raise TraceError("a zip archive, but neither an .npz file nor one that torch.save wrote")
    pack = load_torch_file(path)
    keys = sorted(map(str, pack))[:8] if isinstance(pack, dict) else type(pack).__name__
    if isinstance(pack, dict) and "logical_count" in pack:
        return read_stat(pack)
    if isinstance(pack, dict) and {"records", "last_physical_to_logical_map"} <= pack.keys():
        return read_per_pass([pack])
    raise TraceError(
        f"neither a stat dump (`logical_count`) nor a per_pass dump (`records`, `last_physical_to_logical_map`): {keys}"
    )


def _per_pass_pack(file: Path) -> dict[str, Any]:
    try:
        pack = load_torch_file(file)
    except TraceError as error:
        raise TraceError(f"{file.name}: {error}") from None
    if not isinstance(pack, dict) or not {"records", "last_physical_to_logical_map"} <= pack.keys():
        raise TraceError(f"{file.name} is not a per_pass dump (`records`, `last_physical_to_logical_map`)")
    return pack


def _read_own(archive: zipfile.ZipFile) -> RawTrace:
    header = read_json(archive, "header")
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise TraceError(f"its header does not say format {FORMAT!r}")
    if header.get("version") != VERSION:
        raise TraceError(f"version {header.get('version')!r} of the format; this program reads version {VERSION}")
    metadata = header.get("metadata")
    if not isinstance(metadata, dict):
        raise TraceError("metadata must be a JSON object")
    names = array_names(archive) - {"header"}
    if header.get("arrays") != sorted(names):  # a member whose name was damaged would be missed silently
        raise TraceError(f"its header lists the arrays {header.get('arrays')}, it holds {sorted(names)}")
    return RawTrace(
        read_array(archive, "logical_count"),
        read_array(archive, "forward_pass_ids"),
        read_array(archive, "physical_count") if "physical_count" in names else None,
        read_array(archive, "physical_to_logical_map") if "physical_to_logical_map" in names else None,
        metadata,
    )


def _whole_numbers(value: np.ndarray, name: str, num_dims: int) -> np.ndarray:
    array = np.asarray(value)
    if array.ndim != num_dims or array.dtype.kind not in "iuf":
        raise TraceError(
            f"{name} must be numbers in {num_dims} dimensions, got {array.dtype} of shape {array.shape}", field=name
        )
    require_size(name, array.shape)
    good = array >= 0
    if array.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            good &= (array == np.rint(array)) & (array < 2.0**63)
    elif array.dtype.kind == "u" and array.dtype.itemsize == 8:
        good &= array < 2**63
    if not good.all():
        where = tuple(int(i) for i in np.argwhere(~good)[0])
        raise TraceError(f"{name}{list(where)} is {array[where]}, must be a whole number of at least 0", field=name)
    return array.astype(np.int64)


def _require_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise TraceError(f"{name} must have shape {expected}, got {shape}", field=name)


def _narrowed(array: np.ndarray) -> np.ndarray:
    """The same numbers in the smallest signed integers: a dump of int64 would be mostly zero bytes to pack."""
    top = int(array.max(initial=0))
    return array.astype(next(t for t in (np.int8, np.int16, np.int32, np.int64) if top <= np.iinfo(t).max))
