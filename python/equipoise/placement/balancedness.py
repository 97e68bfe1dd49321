"""How even a load lies on a placement: pure functions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from equipoise.errors import LoadError
from equipoise.placement.metadata import ExpertLocationMetadata

LoadLike = npt.ArrayLike | torch.Tensor


def as_load_array(
    load: LoadLike, *, num_layers: int | None = None, num_logical_experts: int | None = None
) -> np.ndarray:
    """Checks a load matrix and returns it as float64 of shape (L, E) or (T, L, E).

    Raises:
        LoadError: wrong number of dimensions or sizes, NaN, infinity or a negative count; the message names the
            position and the value.
    """
    if isinstance(load, torch.Tensor):
        load = load.detach().cpu().to(torch.float64).numpy()
    try:
        array = np.asarray(load, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise LoadError(f"load must be a matrix of numbers: {error}", field="load") from None
    if array.ndim not in (2, 3):
        raise LoadError(
            f"load must have shape (layers, experts) or (steps, layers, experts), got {array.shape}",
            field="load",
        )
    expected = (num_layers or array.shape[-2], num_logical_experts or array.shape[-1])
    if array.shape[-2:] != expected or 0 in array.shape:
        raise LoadError(
            f"load must end in (layers, experts) = {expected} and not be empty, got shape {array.shape}",
            field="load",
        )
    bad = ~np.isfinite(array) | (array < 0)
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise LoadError(f"load{list(where)} is {array[where]}, must be a finite count of at least 0", field="load")
    return array


def slot_load(load: LoadLike, metadata: ExpertLocationMetadata) -> np.ndarray:
    """Expected tokens per slot, (..., L, P) float64: each expert's load split by its dispatch weights."""
    array = as_load_array(load, num_layers=metadata.num_layers, num_logical_experts=metadata.num_logical_experts)
    p2l = metadata.physical_to_logical_map.cpu().numpy()
    weights = metadata.dispatch_weights.cpu().numpy().astype(np.float64)
    index = np.broadcast_to(p2l, array.shape[:-1] + p2l.shape[-1:])
    return np.take_along_axis(array, index, axis=-1) * weights


def rank_load(load: LoadLike, metadata: ExpertLocationMetadata) -> np.ndarray:
    """Expected tokens per rank, (..., L, G) float64."""
    per_slot = slot_load(load, metadata)
    topology = metadata.topology
    return per_slot.reshape(*per_slot.shape[:-1], topology.num_ranks, topology.slots_per_rank).sum(-1)


def balancedness_of_rank_load(per_rank: np.ndarray) -> np.ndarray:
    """Mean over maximum along the last axis; NaN where no token was seen."""
    top = per_rank.max(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (per_rank / top[..., None]).mean(-1)  # 0 / 0 is the NaN that is meant


def balancedness(load: LoadLike, metadata: ExpertLocationMetadata) -> torch.Tensor:
    """Mean rank load / maximum rank load per layer, in (0, 1].

    Args:
        load: (L, E) tokens per logical expert, or (T, L, E) for T windows each on its own.
        metadata: the placement; its ``dispatch_weights`` say how replicas share an expert's tokens.

    Returns:
        float64 tensor (L,), or (T, L). NaN for a layer that saw no token: average with :func:`mean_balancedness`,
        which leaves those out.

    Raises:
        LoadError: the load has another shape than the placement, or holds NaN or negative counts.
    """
    array = as_load_array(load)
    # Scaled first: sums of counts near the largest float would overflow, and the ratio does not care.
    scaled = array / np.maximum(array.max(-1, keepdims=True), 1.0)
    return torch.from_numpy(balancedness_of_rank_load(rank_load(scaled, metadata)))


def peak_to_average(load: LoadLike, metadata: ExpertLocationMetadata) -> torch.Tensor:
    """PAR: maximum rank load / mean rank load, at least 1; the inverse of :func:`balancedness`."""
    return 1.0 / balancedness(load, metadata)


def mean_balancedness(values: npt.ArrayLike | torch.Tensor) -> float | None:
    """Average over the layers that saw tokens; None when none did."""
    array = np.asarray(values, dtype=np.float64)
    seen = array[~np.isnan(array)]
    return float(seen.mean()) if seen.size else None
