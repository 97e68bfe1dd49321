"""LoadTrace: recorded expert load, whatever recorded it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from equipoise.errors import TraceError
from equipoise.formats.archive import MAX_EXPERTS, write_archive
from equipoise.formats.atomic_file import write_whole
from equipoise.formats.numbers import as_counts, exact_sum
from equipoise.formats.raw_trace import RawTrace, ReadOptions
from equipoise.formats.readers.own import NPZ_FORMAT, NPZ_VERSION
from equipoise.formats.readers.registry import read_recordings


@dataclass(frozen=True, eq=False)
class LoadTrace:
    """Tokens per logical expert, layer and step, oldest step first.

    Attributes:
        logical_count: (T, L, E) int32 or int64, or float64 where the recording has fractions; often a view of a mapped
            file. A token that chose K experts counts K times, once for each. T may be 0.
        forward_pass_ids: (T,) int64, the engine's number of each step; 0, 1, 2, ... if not given.
        physical_count: (T, L, P) tokens per slot, or None where only logical counts were recorded.
        physical_to_logical_map: (L, P) int64, the placement at the end of the recording, or None.
        metadata: JSON values: where the trace comes from (``source``) and whatever its writer adds.
        layer_ids: (L,) int64, the model's numbers of the MoE layers; 0, 1, 2, ... if not given.
        phases: (T,) ints, see :data:`~equipoise.formats.raw_trace.PHASE_NAMES`, or None.
        timestamps: (T,) float64 seconds, or None.
        rank_count: (T, R, L, E) tokens of each source rank, or None where they are not known apart.
        topk_ids: (tokens, L, K) logical experts of each token, -1 for none, or None.
        token_offsets: (T + 1,) first token of each step; with ``topk_ids``.
        found: what the file was, in a few words.
        notes: what was guessed, dropped or ignored while reading, a sentence each.

    Raises:
        TraceError: a field has the wrong shape, or a count is negative, NaN or infinite.
    """

    logical_count: np.ndarray
    forward_pass_ids: np.ndarray = None  # type: ignore[assignment]  # replaced in __post_init__
    physical_count: np.ndarray | None = None
    physical_to_logical_map: np.ndarray | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    layer_ids: np.ndarray = None  # type: ignore[assignment]  # replaced in __post_init__
    phases: np.ndarray | None = None
    timestamps: np.ndarray | None = None
    rank_count: np.ndarray | None = None
    topk_ids: np.ndarray | None = None
    token_offsets: np.ndarray | None = None
    found: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        counts = _counts(self.logical_count, "logical_count", 3)
        num_steps, num_layers, num_experts = counts.shape
        if not (num_layers and 0 < num_experts <= MAX_EXPERTS):
            raise TraceError(f"logical_count must have layers and experts, got shape {counts.shape}")
        set_ = object.__setattr__
        set_(self, "logical_count", counts)
        for name, size in (("forward_pass_ids", num_steps), ("layer_ids", num_layers)):
            ids = np.arange(size) if getattr(self, name) is None else getattr(self, name)
            ids = _counts(ids, name, 1).astype(np.int64)
            _require_shape(name, ids.shape, (size,))
            set_(self, name, ids)
        if self.physical_count is not None:
            physical = _counts(self.physical_count, "physical_count", 3)
            _require_shape("physical_count", physical.shape, (num_steps, num_layers, physical.shape[2]))
            set_(self, "physical_count", physical)
        if self.physical_to_logical_map is not None:
            p2l = _counts(self.physical_to_logical_map, "physical_to_logical_map", 2).astype(np.int64)
            num_slots = p2l.shape[1] if self.physical_count is None else self.physical_count.shape[2]
            _require_shape("physical_to_logical_map", p2l.shape, (num_layers, num_slots))
            if p2l.size and p2l.max() >= num_experts:
                raise TraceError(f"physical_to_logical_map holds expert {p2l.max()} of {num_experts} logical experts")
            set_(self, "physical_to_logical_map", p2l)
        for name in ("phases", "timestamps"):
            if getattr(self, name) is not None:
                _require_shape(name, np.shape(getattr(self, name)), (num_steps,))
        if self.rank_count is not None:
            _require_shape(
                "rank_count", self.rank_count.shape, (num_steps, self.rank_count.shape[1], *counts.shape[1:])
            )

    @property
    def num_steps(self) -> int:
        return self.logical_count.shape[0]

    @property
    def num_layers(self) -> int:
        return self.logical_count.shape[1]

    @property
    def num_logical_experts(self) -> int:
        return self.logical_count.shape[2]

    def total(self, steps: slice = slice(None)) -> np.ndarray:
        """(L, E) int64 or float64: the load of some steps."""
        return exact_sum(self.logical_count[steps])

    def take(self, steps: np.ndarray | slice) -> LoadTrace:
        """The trace of some of the steps, in the order asked for; token ids are left behind."""
        per_step = ("logical_count", "forward_pass_ids", "physical_count", "phases", "timestamps", "rank_count")
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        values.update({name: values[name][steps] for name in per_step if values[name] is not None})
        return LoadTrace(**{**values, "topk_ids": None, "token_offsets": None})

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        tokens_per_step: int = 128,
        num_logical_experts: int | None = None,
        read_as: str = "auto",
    ) -> LoadTrace:
        """Reads recorded load, whatever wrote it; the content decides, not the file name.

        :data:`equipoise.formats.readers.registry.READERS` lists the formats.

        Args:
            path: a file, a directory of per-rank files, or the files of one recording.
            tokens_per_step: for single tokens: how many consecutive ones make a step.
            num_logical_experts: E, where the highest id seen might be smaller.
            read_as: ``counts`` or ``tokens``, for an array that could be either.

        Raises:
            TraceError: missing, damaged, too large, hostile, of no known kind, or more than one recording; the message
                names the file.
        """
        paths = [path] if isinstance(path, str | os.PathLike) else list(path)
        traces = open_traces(
            paths, tokens_per_step=tokens_per_step, num_logical_experts=num_logical_experts, read_as=read_as
        )
        if len(traces) > 1:
            raise TraceError(
                f"trace {Path(paths[0])}: {len(traces)} recordings that are not of one run; open them one by one",
                field="trace",
            )
        return traces[0]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the trace as the .npz that a server dumps, whole or not at all: a zip of plain arrays, which
        ``numpy.load`` reads, with a member ``header`` of JSON. Counts take the smallest signed integers that hold them.

        Raises:
            OSError: the file cannot be written.
            TraceError: the metadata is not JSON.
        """
        arrays = {
            name: _narrowed(array)
            for name in ("logical_count", "forward_pass_ids", "physical_count", "physical_to_logical_map")
            if (array := getattr(self, name)) is not None
        }
        header = {"format": NPZ_FORMAT, "version": NPZ_VERSION, "arrays": sorted(arrays), "metadata": self.metadata}
        try:
            with write_whole(path) as file:
                write_archive(file, header, arrays)
        except (TypeError, ValueError) as error:
            raise TraceError(f"trace {Path(path)}: metadata is not JSON: {error}", field="metadata") from error


def open_traces(
    paths: Sequence[str | os.PathLike[str]],
    *,
    tokens_per_step: int = 128,
    num_logical_experts: int | None = None,
    read_as: str = "auto",
) -> list[LoadTrace]:
    """Reads one or more recordings; files of one recording become one trace, see :meth:`LoadTrace.open`.

    A trace whose number of experts was guessed takes the largest number of the others.

    Raises:
        TraceError: a file cannot be read, or the recordings are of different models; the message names the files.
    """
    options = ReadOptions(tokens_per_step, num_logical_experts, read_as)
    found = read_recordings([Path(path) for path in paths], options)
    most = max(raw.logical_count.shape[2] for _, raw in found)
    guessed = [any("guessed" in note for note in raw.notes) for _, raw in found]
    if any(g and raw.logical_count.shape[2] < most for g, (_, raw) in zip(guessed, found, strict=True)):
        found = read_recordings([Path(path) for path in paths], ReadOptions(tokens_per_step, most, read_as))
    traces = [_trace(files[0], raw) for files, raw in found]
    for (files, _), trace in zip(found, traces, strict=True):
        expected, got = ((t.num_layers, t.num_logical_experts) for t in (traces[0], trace))
        if expected != got:
            raise TraceError(
                f"trace {files[0]} has (layers, experts) = {got}, {found[0][0][0]} has {expected}: not the same model",
                field="trace",
            )
    return traces


def _trace(path: Path, raw: RawTrace) -> LoadTrace:
    values = {each.name: getattr(raw, each.name) for each in fields(raw)}
    try:
        return LoadTrace(**values)
    except TraceError as error:
        raise TraceError(f"trace {path}: {error}", field="trace") from None


def _counts(value: np.ndarray, name: str, num_dims: int) -> np.ndarray:
    array = np.asarray(value)
    if array.ndim != num_dims or array.dtype.kind not in "iuf":
        raise TraceError(
            f"{name} must be numbers in {num_dims} dimensions, got {array.dtype} of shape {array.shape}", field=name
        )
    try:
        return as_counts(array, name)
    except TraceError as error:
        raise TraceError(str(error), field=name) from None


def _require_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise TraceError(f"{name} must have shape {expected}, got {shape}", field=name)


def _narrowed(array: np.ndarray) -> np.ndarray:
    """The same numbers in the smallest signed integers: a dump of int64 would be mostly zero bytes to pack."""
    if array.dtype.kind == "f":
        return array
    top = int(array.max(initial=0))
    return array.astype(next(t for t in (np.int8, np.int16, np.int32, np.int64) if top <= np.iinfo(t).max))
