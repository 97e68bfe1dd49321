"""StepRecording: counts step by step between an operator's start and stop, and the file they are dumped to."""

from __future__ import annotations

import errno
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from equipoise.errors import ConfigError, StorageError
from equipoise.load.trace import LoadTrace
from equipoise.placement.metadata import ExpertLocationMetadata

MAX_DUMPS = 1000
"""Dumps that a directory may hold: a client in a loop must not fill the disk."""


@dataclass(frozen=True)
class LoadSnapshot:
    """The steps of a recording, oldest first, summed over ranks; on the CPU."""

    logical_count: torch.Tensor  # (T, L, E) int64
    physical_count: torch.Tensor | None  # (T, L, P) int64, if the recording keeps it
    forward_pass_ids: tuple[int, ...]  # (T,)


class StepRecording:
    """The last ``buffer_size`` steps of this rank; takes no memory before it is started.

    Args:
        num_layers, num_physical_experts, num_logical_experts: ``L``, ``P``, ``E``.
        buffer_size: steps kept; a running recording takes ``4 * buffer_size * L * E`` bytes on the device, plus as much
            with ``P`` for ``keep_physical``. 1000 steps of DeepSeek-V3 take 59 MB.
        keep_physical: keep physical counts as well (recorder mode ``per_pass``).
    """

    def __init__(
        self,
        num_layers: int,
        num_physical_experts: int,
        num_logical_experts: int,
        *,
        buffer_size: int,
        device: torch.device | str,
        keep_physical: bool = False,
    ) -> None:
        widths = [num_logical_experts] + ([num_physical_experts] if keep_physical else [])
        self._shapes = [(buffer_size, num_layers, width) for width in widths]
        self._device = device
        self._buffers: list[torch.Tensor] = []  # logical counts, then physical ones
        self._forward_pass_ids: deque[int] = deque(maxlen=buffer_size)
        self._next_row = 0
        self.running = False

    @property
    def num_steps(self) -> int:
        """Steps held, at most ``buffer_size``."""
        return len(self._forward_pass_ids)

    def start(self) -> None:
        """Begins anew: what was held is dropped."""
        if not self._buffers:
            self._buffers = [torch.zeros(shape, dtype=torch.int32, device=self._device) for shape in self._shapes]
        self._forward_pass_ids.clear()
        self._next_row = 0
        self.running = True

    def drop(self) -> None:
        """Ends, and forgets what was held."""
        self._forward_pass_ids.clear()
        self.running = False

    def stop(self) -> None:
        """Ends; what is held can still be read."""
        self.running = False

    def add(self, physical: torch.Tensor, physical_to_logical_map: torch.Tensor, forward_pass_id: int) -> None:
        """Keeps one step: (L, P) int32 counts, and the (L, P) int64 map that was live."""
        self._buffers[0][self._next_row].zero_().scatter_add_(1, physical_to_logical_map, physical)
        if len(self._buffers) > 1:
            self._buffers[1][self._next_row].copy_(physical)
        self._forward_pass_ids.append(forward_pass_id)
        self._next_row = (self._next_row + 1) % self._shapes[0][0]

    def counts(self) -> torch.Tensor:
        """(T, L, E) int64, oldest step first, or (T, L, E + P) with physical counts; of this rank, on the device."""
        newest_last = torch.arange(self._next_row - self.num_steps, self._next_row, device=self._device)
        rows = newest_last % self._shapes[0][0]
        return torch.cat([buffer[rows] for buffer in self._buffers], dim=2).to(torch.int64)

    def snapshot(self, counts: torch.Tensor) -> LoadSnapshot:
        """What :meth:`counts` gave, summed over ranks."""
        split = counts.cpu().split([shape[2] for shape in self._shapes], dim=2)
        return LoadSnapshot(split[0], split[1] if len(split) > 1 else None, tuple(self._forward_pass_ids))


def write_dump(
    snapshot: LoadSnapshot, metadata: ExpertLocationMetadata, layer_ids: list[int], directory: str, wall_clock: float
) -> Path:
    """Writes a snapshot as a LoadTrace, whole or not at all.

    Args:
        layer_ids: the host's numbers of the MoE layers.
        wall_clock: seconds since the epoch, for the file's name.

    Returns:
        The file's absolute path.

    Raises:
        ConfigError: the directory is missing or cannot be written.
        StorageError: the disk is full, or :data:`MAX_DUMPS` dumps lie there already.
    """
    kept = len(list(Path(directory).glob("expert_distribution_*.npz")))
    if kept >= MAX_DUMPS:
        raise StorageError(f"dump_dir {directory!r} holds {kept} dumps, at most {MAX_DUMPS} are kept: remove some")
    first, last = snapshot.forward_pass_ids[0], snapshot.forward_pass_ids[-1]
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(wall_clock)) + f"{wall_clock % 1:.3f}"[1:].replace(".", "")
    path = Path(directory).resolve() / f"expert_distribution_{stamp}_{first}-{last}.npz"
    topology = metadata.topology
    trace = LoadTrace(
        logical_count=snapshot.logical_count.numpy(),
        forward_pass_ids=np.array(snapshot.forward_pass_ids),
        physical_count=None if snapshot.physical_count is None else snapshot.physical_count.numpy(),
        physical_to_logical_map=metadata.physical_to_logical_map.cpu().numpy(),
        metadata={
            "source": "equipoise",
            "num_ranks": topology.num_ranks,
            "num_nodes": topology.num_nodes,
            "slots_per_rank": topology.slots_per_rank,
            "layer_ids": layer_ids,
        },
    )
    try:
        trace.save(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"no room for a dump in dump_dir {directory!r}: {error}") from None
        raise ConfigError(f"cannot write a dump into dump_dir {directory!r}: {error}", field="dump_dir") from None
    return path
