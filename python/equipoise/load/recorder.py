"""ExpertDistributionRecorder: tokens per physical expert, per layer and step, in a bounded ring on the device.

Counting adds no host sync. At the end of a step its physical counts are folded into logical ones through the map
that was live during that step, so a window stays true when experts move in the middle of it. Ranks are summed only
when somebody asks. Nothing but :meth:`ExpertDistributionRecorder.reset` throws a window away.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch

from equipoise.distributed.communicator import Communicator


@dataclass(frozen=True)
class LoadSnapshot:
    """The steps in the ring, oldest first, summed over ranks; on the CPU."""

    logical_count: torch.Tensor  # (T, L, E) int64
    physical_count: torch.Tensor | None  # (T, L, P) int64, if the recorder keeps it
    forward_pass_ids: tuple[int, ...]  # (T,)


class ExpertDistributionRecorder:
    """Counts of this rank's tokens; every rank has one and calls it alike.

    Args:
        num_layers, num_physical_experts, num_logical_experts: ``L``, ``P``, ``E``.
        buffer_size: steps kept; memory on the device is ``4 * buffer_size * L * E`` bytes, plus as much with ``P`` for
            ``keep_physical``. 1000 steps of DeepSeek-V3 take 59 MB.
        keep_physical: keep physical counts per step as well (recorder mode ``per_pass``).
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
        self._num_slots = num_physical_experts
        self._buffer_size = buffer_size
        # One column more than there are slots: it swallows the ids that mean "no expert".
        self._step = torch.zeros(num_layers, num_physical_experts + 1, dtype=torch.int32, device=device)
        self._logical = torch.zeros(buffer_size, num_layers, num_logical_experts, dtype=torch.int32, device=device)
        self._physical = (
            torch.zeros(buffer_size, num_layers, num_physical_experts, dtype=torch.int32, device=device)
            if keep_physical
            else None
        )
        self._forward_pass_ids: deque[int] = deque(maxlen=buffer_size)
        self._next_row = 0
        self._recording = False

    @property
    def recording(self) -> bool:
        return self._recording

    @property
    def num_steps(self) -> int:
        """Steps in the ring, at most ``buffer_size``."""
        return len(self._forward_pass_ids)

    def start(self) -> None:
        """Counts from the next step on; what the ring holds stays."""
        self._step.zero_()
        self._recording = True

    def stop(self) -> None:
        """Counts no further; what the ring holds can still be read."""
        self._recording = False

    def reset(self) -> None:
        """Empties the ring."""
        self._forward_pass_ids.clear()
        self._next_row = 0
        self._step.zero_()

    def record(self, layer_id: int, physical_ids: torch.Tensor) -> None:
        """Counts the slots of a batch.

        Args:
            layer_id: MoE layer, 0-based.
            physical_ids: any shape, int64 slots; -1 for "none".
        """
        if not self._recording:
            return
        flat = physical_ids.reshape(-1)
        column = torch.where(flat < 0, self._num_slots, flat)
        self._step[layer_id].scatter_add_(0, column, torch.ones_like(column, dtype=torch.int32))

    def end_step(self, physical_to_logical_map: torch.Tensor, *, forward_pass_id: int, counted: bool) -> None:
        """Closes a step.

        Args:
            physical_to_logical_map: (L, P) int64, the live map of this step.
            forward_pass_id: number of the step, the same on all ranks.
            counted: False for warm-up and idle steps, which leave no trace. The same on all ranks.
        """
        if not self._recording:
            return
        if counted:
            physical = self._step[:, : self._num_slots]
            row = self._logical[self._next_row].zero_()
            row.scatter_add_(1, physical_to_logical_map, physical)
            if self._physical is not None:
                self._physical[self._next_row].copy_(physical)
            self._forward_pass_ids.append(forward_pass_id)
            self._next_row = (self._next_row + 1) % self._buffer_size
        self._step.zero_()

    def snapshot(self, communicator: Communicator) -> LoadSnapshot:
        """The whole ring in one reduction over ranks. Collective; changes nothing."""
        rows = self._rows(self.num_steps)
        parts = [self._logical[rows]] + ([self._physical[rows]] if self._physical is not None else [])
        widths = [part.shape[2] for part in parts]
        total = torch.cat(parts, dim=2).to(torch.int64)
        communicator.all_reduce_sum_(total)
        split = total.cpu().split(widths, dim=2)
        return LoadSnapshot(
            logical_count=split[0],
            physical_count=split[1] if self._physical is not None else None,
            forward_pass_ids=tuple(self._forward_pass_ids),
        )

    def windows(self, communicator: Communicator, *, num_windows: int, last: int) -> torch.Tensor:
        """The last steps as a few consecutive windows of load, summed over ranks: what a plan is made from.

        Summed over steps before it is summed over ranks, so the reduction is small whatever the ring holds.

        Args:
            num_windows: at most this many; fewer if there are fewer steps, none if there is none.
            last: steps to look back on.

        Returns:
            (W, L, E) int64 on the CPU, oldest first; windows differ by at most one step in length. Collective.
        """
        steps = min(last, self.num_steps)
        rows = self._rows(steps)
        count = min(num_windows, steps)
        sums = [self._logical[part].sum(0, dtype=torch.int64) for part in rows.tensor_split(count)] if count else []
        total = torch.stack(sums) if sums else self._logical[:0].to(torch.int64)
        if sums:
            communicator.all_reduce_sum_(total)
        return total.cpu()

    def _rows(self, steps: int) -> torch.Tensor:
        """Ring rows of the last ``steps`` steps, oldest first."""
        newest_last = torch.arange(self._next_row - steps, self._next_row, device=self._logical.device)
        return newest_last % self._buffer_size
