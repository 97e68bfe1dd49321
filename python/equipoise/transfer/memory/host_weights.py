"""Checks the weights that a host hands in, and views them as rows of bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from equipoise.config import Verification
from equipoise.errors import ConfigError

ExpertTensor = torch.Tensor | Sequence[torch.Tensor]
"""One tensor of all experts of a layer: (slots_per_rank, ...), or a list of slots_per_rank tensors (...)."""


def row_views(tensor: ExpertTensor) -> list[torch.Tensor]:
    """Views the bytes of each slot's row as (bytes,) uint8: writing to a view writes the tensor."""
    rows = tensor.unbind(0) if isinstance(tensor, torch.Tensor) else tensor
    return [row.detach().view(-1).view(torch.uint8) for row in rows]


def with_canary(tensors: Sequence[ExpertTensor], verification: Verification) -> list[ExpertTensor]:
    """Appends, unless verification is ``off``, the int64 canaries of the rows, one a slot, to ``tensors``.

    They are zero until a plan has said what the slots hold.
    """
    if verification == "off":
        return list(tensors)
    # Hazard: a tensor that is made inside torch.inference_mode() cannot be written outside of it.
    with torch.inference_mode(mode=False):
        return [*tensors, torch.zeros(len(tensors[0]), dtype=torch.int64, device=tensors[0][0].device)]


def require_usable(expert_weights: Sequence[Sequence[ExpertTensor]], slots_per_rank: int) -> None:
    """Checks the tensors that a host hands in.

    Raises:
        ConfigError: a layer without tensors, a tensor or list without ``slots_per_rank`` rows, rows that are not
            contiguous or differ in shape or dtype, or tensors on several devices; the message names layer and tensor.
    """
    devices = {row.device for tensors in expert_weights for tensor in tensors for row in _some_rows(tensor)}
    if len(devices) > 1:
        raise ConfigError(f"expert_weights lie on several devices: {sorted(map(str, devices))}", field="expert_weights")
    for layer, tensors in enumerate(expert_weights):
        if not tensors:
            raise ConfigError(f"expert_weights[{layer}] holds no tensor", field="expert_weights")
        for index, tensor in enumerate(tensors):
            _require_rows(tensor, slots_per_rank, f"expert_weights[{layer}][{index}]")


def _some_rows(tensor: ExpertTensor) -> Sequence[torch.Tensor]:
    """Rows by which a tensor's device can be told: all of a list, whose tensors may lie apart."""
    return (tensor,) if isinstance(tensor, torch.Tensor) else tensor


def _require_rows(tensor: ExpertTensor, slots_per_rank: int, name: str) -> None:
    if isinstance(tensor, torch.Tensor):
        where, num_rows = f"{name} of shape {tuple(tensor.shape)}", tensor.shape[0] if tensor.dim() else 0
    else:
        kinds = sorted({f"{tuple(row.shape)} {row.dtype}" for row in tensor})
        where, num_rows = f"{name}, a list of {len(tensor)} tensors of shape {', '.join(kinds)},", len(tensor)
        if len(kinds) > 1:
            raise ConfigError(f"{where} must hold tensors of one shape and dtype", field="expert_weights")
    if num_rows != slots_per_rank:
        raise ConfigError(f"{where} must have slots_per_rank={slots_per_rank} rows", field="expert_weights")
    rows = tensor[:1] if isinstance(tensor, torch.Tensor) else tensor
    for row in rows:
        if not row.is_contiguous():
            strides = tensor.stride() if isinstance(tensor, torch.Tensor) else row.stride()
            raise ConfigError(f"{where} and strides {strides} must have contiguous rows", field="expert_weights")
