"""The maps of a placement as arrays: what was handed in is checked, and its inverse and dispatch form are built.

Apart from ``ExpertLocationMetadata``, which holds such maps and changes them in place:
here nothing is kept, and every array is new.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from equipoise.errors import PlacementError
from equipoise.topology import EpTopology

IntMap = npt.ArrayLike | torch.Tensor


class ExpertMaps(NamedTuple):
    """The arrays of one placement, which agree with each other; none shares memory with what was handed in."""

    physical_to_logical_map: np.ndarray  # (L, P) int64
    logical_to_physical_map: np.ndarray  # (L, E, X) int64, slots of each expert ascending, padded with -1
    num_replicas: np.ndarray  # (L, E) int64
    dispatch_weights: np.ndarray  # (L, P) float32, sums to 1 per expert
    dispatch_cdf: np.ndarray  # (L, E, X) float32, running sum of the weights, 1 from the last replica with a weight on


def build_expert_maps(
    physical_to_logical_map: IntMap,
    num_logical_experts: int,
    topology: EpTopology,
    *,
    dispatch_weights: npt.ArrayLike | torch.Tensor | None = None,
    max_replicas: int | None = None,
) -> ExpertMaps:
    """Checks a map and builds what follows from it.

    Args:
        physical_to_logical_map: (L, P) ints.
        num_logical_experts: ``E``.
        topology: where slots lie; ``P`` is its ``num_slots``.
        dispatch_weights: (L, P) shares, non-negative, summing to 1 per expert; uniform over replicas if None.
        max_replicas: ``X``; as many as the map needs if None.

    Raises:
        PlacementError: wrong shape, an id outside [0, E), an expert without a slot or with more than ``X``, weights
            that do not sum to 1. The message names the layer, the experts and the values.
    """
    # A copy: nobody else can change it.
    p2l = np.array(as_slot_map(physical_to_logical_map, "physical_to_logical_map", topology), np.int64, order="C")
    num_replicas = _replicas_of_every_expert(p2l, num_logical_experts)
    most = int(num_replicas.max())
    if max_replicas is not None and most > max_replicas:
        raise PlacementError(
            f"an expert has {most} replicas, more than max_replicas={max_replicas}", field="max_replicas"
        )
    weights = _checked_weights(dispatch_weights, p2l, num_replicas)

    # Slots sorted by expert, layer after layer; each expert of a layer is a row of what follows, and its n-th replica
    # a column. Numpy sorts short integers by radix.
    keys = p2l.astype(np.int16) if num_logical_experts <= 1 << 15 else p2l
    order = np.argsort(keys, axis=1, kind="stable")
    num_layers, num_slots = p2l.shape
    slot = (order + np.arange(num_layers)[:, None] * num_slots).ravel()
    row = p2l.ravel()[slot] + np.repeat(np.arange(num_layers) * num_logical_experts, num_slots)
    count = num_replicas.ravel()
    first = np.cumsum(count) - count

    shape = (*num_replicas.shape, max_replicas or most)
    row_before = np.arange(len(count)) * shape[2] - first  # what takes an index of `slot` to its column of its row
    l2p = np.full(len(count) * shape[2], -1, dtype=np.int64)
    l2p[np.arange(len(row)) + row_before[row]] = order.ravel()
    cdf = np.ones((len(count), shape[2]), dtype=np.float32)
    several = np.flatnonzero(count > 1)  # the others have one replica, with the whole share
    cdf[several] = _running_sums(weights.ravel()[slot], first[several], count[several], shape[2])
    return ExpertMaps(p2l, l2p.reshape(shape), num_replicas, weights, cdf.reshape(shape))


def _running_sums(shares: np.ndarray, first: np.ndarray, count: np.ndarray, num_columns: int) -> np.ndarray:
    """(M, X) float64 running sums of M runs of ``shares``, each ``count`` numbers from ``first`` on."""
    columns, last = np.zeros((num_columns, len(count))), np.zeros(len(count), dtype=np.int64)
    for column in range(int(count.max(initial=0))):
        runs = np.flatnonzero(count > column)
        columns[column, runs] = part = shares[first[runs] + column]
        last[runs[part > 0]] = column
    sums = np.cumsum(columns, axis=0)
    # From the last replica with a share on the sum is 1 by definition: rounding must leave no gap above it, nor below 1
    # for a replica without one.
    sums[np.arange(num_columns)[:, None] >= last] = 1.0
    return sums.T


def as_slot_map(value: IntMap, name: str, topology: EpTopology) -> np.ndarray:
    """``value`` as an array of integers of shape (L, P), L at least 1; it may share memory with ``value``.

    Raises:
        PlacementError: another shape, or no integers; ``name`` is the field that it names.
    """
    array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    if array.ndim != 2 or array.shape[1] != topology.num_slots or array.shape[0] < 1:
        raise PlacementError(
            f"{name} must have shape (layers, {topology.num_slots}) for {topology}, got {array.shape}", field=name
        )
    if not np.issubdtype(array.dtype, np.integer):
        raise PlacementError(f"{name} must hold integers, got dtype {array.dtype}", field=name)
    return array


def _replicas_of_every_expert(p2l: np.ndarray, num_logical_experts: int) -> np.ndarray:
    """(L, E) int64 replicas of each expert, all at least 1."""
    if p2l.min() < 0 or p2l.max() >= num_logical_experts:
        layer, slot = (int(i) for i in np.argwhere((p2l < 0) | (p2l >= num_logical_experts))[0])
        raise PlacementError(
            f"physical_to_logical_map[{layer}][{slot}] is {p2l[layer, slot]}, "
            f"outside [0, {num_logical_experts}) logical experts",
            field="physical_to_logical_map",
        )
    num_replicas = _sum_by_expert(p2l, num_logical_experts)
    if not num_replicas.all():
        layer = int(np.flatnonzero(~num_replicas.all(1))[0])
        missing = np.flatnonzero(num_replicas[layer] == 0).tolist()
        shown = str(missing) if len(missing) <= 8 else f"{str(missing[:8])[:-1]}, ...] ({len(missing)} in all)"
        raise PlacementError(
            f"physical_to_logical_map misses experts {shown} in layer {layer}: each of the {num_logical_experts} "
            f"logical experts needs at least one of the {p2l.shape[1]} slots",
            field="physical_to_logical_map",
        )
    return num_replicas


def _checked_weights(
    weights: npt.ArrayLike | torch.Tensor | None, p2l: np.ndarray, num_replicas: np.ndarray
) -> np.ndarray:
    """(L, P) float32 shares; uniform over the replicas of an expert if ``weights`` is None."""
    if weights is None:
        return (1.0 / np.take_along_axis(num_replicas, p2l, axis=1)).astype(np.float32)
    raw = weights.detach().cpu().numpy() if isinstance(weights, torch.Tensor) else np.asarray(weights)
    if raw.shape != p2l.shape:
        raise PlacementError(f"dispatch_weights must have shape {p2l.shape}, got {raw.shape}", field="dispatch_weights")
    array = np.array(raw, dtype=np.float32, order="C")
    usable = np.isfinite(array) & (array >= 0)
    if not usable.all():
        layer, slot = (int(i) for i in np.argwhere(~usable)[0])
        raise PlacementError(
            f"dispatch_weights[{layer}][{slot}] is {array[layer, slot]}, must be finite and not negative",
            field="dispatch_weights",
        )
    sums = _sum_by_expert(p2l, num_replicas.shape[1], array)
    off = np.abs(sums - 1.0) > 1e-4
    if off.any():
        layer, expert = (int(i) for i in np.argwhere(off)[0])
        raise PlacementError(
            f"dispatch_weights of expert {expert} in layer {layer} sum to {sums[layer, expert]:.6g}, must be 1",
            field="dispatch_weights",
        )
    return array


def _sum_by_expert(p2l: np.ndarray, num_logical_experts: int, values: np.ndarray | None = None) -> np.ndarray:
    """(L, E): the sum of ``values`` (L, P) over each expert's slots, float64; how many they are, int64, if None."""
    num_layers = len(p2l)
    keys = (p2l + np.arange(num_layers)[:, None] * num_logical_experts).ravel()
    weights = None if values is None else values.ravel()
    sums = np.bincount(keys, weights, minlength=num_layers * num_logical_experts)
    return sums.reshape(num_layers, num_logical_experts)
