"""Numbers from files of strangers: checked for shape, size, sign and overflow before anything is computed from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from equipoise.errors import TraceError
from equipoise.formats.archive import MAX_EXPERTS, require_size

_CHUNK = 1 << 22
"""Values looked at together, so that a check of a gigabyte allocates no second one."""


def as_numbers(value: Any, name: str, num_dims: int | Sequence[int], *, experts_last: bool = True) -> np.ndarray:
    """A tensor, an array or nested lists as an array; a tensor of integers is a view, not a copy.

    Args:
        num_dims: how many dimensions it may have.
        experts_last: the last axis counts experts or slots, so it has a limit.

    Raises:
        TraceError: not numbers, another shape, or larger than a file may be. ``name`` is in the message.
    """
    allowed = (num_dims,) if isinstance(num_dims, int) else tuple(num_dims)
    if isinstance(value, torch.Tensor):
        array = _from_tensor(value, name)
    else:
        try:
            array = np.asarray(value)
        except ValueError:
            raise TraceError(f"{name} must be a matrix, its rows have different lengths") from None
    if array.dtype.kind not in "iuf" or array.ndim not in allowed or 0 in array.shape:
        dims = " or ".join(map(str, allowed))
        raise TraceError(f"{name} must be numbers in {dims} dimensions, got {array.dtype} of shape {array.shape}")
    if experts_last and array.shape[-1] > MAX_EXPERTS:
        raise TraceError(f"{name} has {array.shape[-1]} experts a layer, the limit is {MAX_EXPERTS}")
    return array


def _from_tensor(value: torch.Tensor, name: str) -> np.ndarray:
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_complex() or value.is_quantized:
        raise TraceError(f"{name} must be a dense tensor of numbers")
    if value.dtype == torch.bool:
        raise TraceError(f"{name} must be numbers, got bool")
    # A few bytes with stride 0 can stand for any shape: the bytes that are there say what may be filled.
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        require_size(name, tuple(value.shape))
    if value.is_floating_point() and value.dtype not in (torch.float32, torch.float64):
        value = value.to(torch.float32)  # numpy has no bfloat16
    return value.detach().numpy()


def require_counts(array: np.ndarray, name: str) -> None:
    """
    Raises:
        TraceError: a count is negative, NaN or infinite; the message names the first one and where it is.
    """
    flat = array.reshape(-1) if array.flags.c_contiguous else np.ascontiguousarray(array).reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        good = part >= 0  # NaN is not
        if part.dtype.kind == "f":
            good &= part < np.inf
        elif part.dtype == np.uint64:
            good &= part < 2**63
        if not good.all():
            where = np.unravel_index(start + int(np.argmin(good)), array.shape)
            index = [int(i) for i in where]
            raise TraceError(
                f"{name}{index} is {array[where]}, must be a whole number of at least 0"
                if array.dtype.kind != "f"
                else f"{name}{index} is {array[where]}, must be a finite count of at least 0"
            )


def as_counts(array: np.ndarray, name: str) -> np.ndarray:
    """Counts in a type whose sums are safe: int32 or int64 where they are whole, else float64.

    A view where the file's own type will do, so that a large dump is held once.

    Raises:
        TraceError: as :func:`require_counts`.
    """
    require_counts(array, name)
    if array.dtype.kind == "f":
        whole = is_whole(array)
        if whole and float(array.max(initial=0)) < 2.0**62:
            return array.astype(np.int64)
        return array.astype(np.float64, copy=False)
    if array.dtype in (np.dtype(np.int32), np.dtype(np.int64)):
        return array
    return array.astype(np.int32 if array.dtype.itemsize < 4 else np.int64)


def is_whole(array: np.ndarray) -> bool:
    """Whether no value has a fraction."""
    flat = array.reshape(-1)
    return all(
        bool((part == np.rint(part)).all())
        for part in (flat[start : start + _CHUNK] for start in range(0, flat.size, _CHUNK))
    )


def exact_sum(array: np.ndarray, axis: int = 0) -> np.ndarray:
    """Sum along ``axis`` in int64, or in float64 where int64 would overflow (counts near 2**62) or counts have
    fractions."""
    if array.dtype.kind == "f":
        return array.sum(axis, dtype=np.float64)
    top = int(array.max(initial=0))
    if top * max(1, array.shape[axis]) >= 2**62:
        return array.sum(axis, dtype=np.float64)
    return array.sum(axis, dtype=np.int64)


def to_logical_count(physical_count: np.ndarray, physical_to_logical_map: np.ndarray, num_experts: int) -> np.ndarray:
    """Counts per slot (T, L, P) summed over each expert's replicas: (T, L, E), int64 or float64."""
    num_steps, num_layers, num_slots = physical_count.shape
    require_size("logical_count", (num_steps, num_layers, num_experts))
    whole = physical_count.dtype.kind != "f" and int(physical_count.max(initial=0)) * num_slots < 2**62
    logical = np.zeros((num_steps, num_layers, num_experts), dtype=np.int64 if whole else np.float64)
    for layer, experts in enumerate(physical_to_logical_map):
        np.add.at(logical[:, layer].T, experts, physical_count[:, layer].T)
    return logical


def require_integer(value: Any, name: str, low: int = 0, high: int = 2**63 - 1) -> int:
    """
    Raises:
        TraceError: not an integer in [low, high].
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= int(value) <= high:
        limit = f" and at most {high}" if high < 2**63 - 1 else ""
        raise TraceError(f"{name} must be an integer of at least {low}{limit}, got {_short(value)}")
    return int(value)


def human_list(items: Sequence[Any], limit: int = 8) -> str:
    """The first few items for a message."""
    shown = ", ".join(str(item) for item in items[:limit])
    return shown + (f", ... ({len(items)} in all)" if len(items) > limit else "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def num_bytes(shape: Sequence[int], itemsize: int) -> int:
    return math.prod(shape) * itemsize
