"""Arrays without a story: ``.npy``, ``.npz``, ``.pt``, ``.safetensors`` of counts (L, E) or (T, L, E), or token ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from equipoise.errors import TraceError
from equipoise.formats.archive import read_array
from equipoise.formats.container import Container, map_tensor
from equipoise.formats.numbers import as_counts, as_numbers
from equipoise.formats.raw_trace import RawTrace, ReadOptions
from equipoise.formats.readers.tokens import count_tokens

_COUNT_NAMES = ("logical_count", "counts", "count", "load", "expert_load", "weight")
_TOKEN_NAMES = ("topk", "topk_ids", "expert_ids", "routed_experts", "selected_experts")
_MAX_TOP_K = 32
_LOOKED_AT = 4096  # tokens


def is_array(container: Container) -> bool:
    return _pick(container) is not None


def read_array_file(container: Container, options: ReadOptions) -> RawTrace:
    """The array that the file holds.

    Without a name that says which, integers whose last axis never repeats a value are token ids: counts of experts
    repeat, the experts of a token do not. ``options.read_as`` settles it.

    Raises:
        TraceError: no number of dimensions that counts or ids could have.
    """
    name, value = _pick(container) or ("", None)
    array = as_numbers(value, name or "the array", (2, 3))
    notes = []
    as_tokens = options.read_as == "tokens" or name in _TOKEN_NAMES
    if options.read_as == "auto" and name not in _TOKEN_NAMES + _COUNT_NAMES and _looks_like_tokens(array):
        as_tokens = True
        notes.append("taken for expert ids of tokens, as no row names one twice (--read-as counts says otherwise)")
    if as_tokens:
        if array.ndim != 3:
            raise TraceError(f"token ids must have shape (tokens, layers, k), got {array.shape}")
        raw = count_tokens(np.asarray(array), options, name=name or "the array")
        return RawTrace(**{**raw.__dict__, "notes": (*notes, *raw.notes)})
    counts = as_counts(array, name or "the array")
    if counts.dtype.kind == "f":
        notes.append("counts have fractions and are taken as they are")
    others = sorted(container.names - {name})
    if others:
        notes.append(f"{', '.join(others[:8])} beside it ignored")
    return RawTrace(
        counts[None] if counts.ndim == 2 else counts,
        metadata={"source": "array"},
        found=f"array of counts {tuple(array.shape)}",
        notes=tuple(notes),
    )


def _pick(container: Container) -> tuple[str, Any] | None:
    """Name and value of the array that is meant: the only one, or the one with a telling name."""
    kind, content = container.kind, container.content
    if kind == "npy":
        return "", content
    if kind == "torch" and isinstance(content, torch.Tensor):
        return "", content
    if kind == "json" and isinstance(content, list):
        return "", content
    names = container.names
    known = [name for name in (*_COUNT_NAMES, *_TOKEN_NAMES) if name in names]
    if not known and len(names) == 1 and kind in ("npz", "safetensors", "torch"):
        known = list(names)
    if not known:
        return None
    name = known[0]
    if kind == "npz":
        return name, read_array(content, name)
    if kind == "safetensors":
        return name, map_tensor(container.path, content, name)
    if kind == "torch" and isinstance(content, dict):
        return name, content.get(name)
    return None


def _looks_like_tokens(array: np.ndarray) -> bool:
    if array.ndim != 3 or array.dtype.kind not in "iu" or not 2 <= array.shape[2] <= _MAX_TOP_K:
        return False
    part = np.sort(array[:_LOOKED_AT], axis=-1)
    distinct = (part[..., 1:] != part[..., :-1]) | (part[..., 1:] < 0)
    small = int(part.max()) < max(64, 64 * array.shape[2])
    return bool(distinct.all()) and small and array.shape[0] >= 64
