"""Copies rows of several tensors at once, from the host to a device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

_ALIGNMENT = 8  # bytes; every dtype's view starts on a multiple of its size


def copy_rows_(
    targets: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    padding: Sequence[float],
    index: Sequence[int],
    source_index: Sequence[int],
) -> None:
    """Sets ``targets[i][index]`` to ``sources[i][source_index]``, in place.

    Args:
        targets: on one device.
        sources: on one device, of the targets' dtypes. Their last dimension may be narrower or wider than the targets':
            what is missing is filled with ``padding``, what does not fit left out.
        padding: one value a tensor.
        index: rows of the targets.
        source_index: as many rows of the sources.
    """
    if targets[0].device != sources[0].device and sources[0].device.type == "cpu":
        rows = [
            _fitted(source[list(source_index)], target.shape[-1], value)
            for target, source, value in zip(targets, sources, padding, strict=True)
        ]
        _scatter_rows_(targets, rows, index)
        return
    for target, source, value in zip(targets, sources, padding, strict=True):
        width = min(target.shape[-1], source.shape[-1])
        for row, source_row in zip(index, source_index, strict=True):
            target[row][..., :width].copy_(source[source_row][..., :width])
            if width < target.shape[-1]:
                target[row][..., width:].fill_(value)


def _fitted(rows: torch.Tensor, width: int, value: float) -> torch.Tensor:
    return pad(rows[..., :width], (0, max(0, width - rows.shape[-1])), value=value)


def _scatter_rows_(targets: Sequence[torch.Tensor], rows: Sequence[torch.Tensor], index: Sequence[int]) -> None:
    """Brings rows from the host to a device.

    One packed, pinned buffer and one asynchronous copy carry all of it; a copy for each tensor from pageable memory
    would each drain what the stream has queued. The pinned memory is torch's: it is not handed out again before the
    copy is done.
    """
    device = targets[0].device
    parts = [torch.tensor(list(index), dtype=torch.int64), *(part.contiguous() for part in rows)]
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + -(-part.nbytes // _ALIGNMENT) * _ALIGNMENT)
    packed = _host_buffer(starts[-1], device)
    for start, part in zip(starts, parts, strict=False):
        packed[start : start + part.nbytes].copy_(part.reshape(-1).view(torch.uint8))
    landed = packed.to(device, non_blocking=True)
    where, *sections = (
        landed[start : start + part.nbytes].view(part.dtype).view(part.shape)
        for start, part in zip(starts, parts, strict=False)
    )
    for target, section in zip(targets, sections, strict=True):
        target.index_copy_(0, where, section)


def _host_buffer(num_bytes: int, device: torch.device) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
