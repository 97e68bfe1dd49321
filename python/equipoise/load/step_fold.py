"""StepFold: what the end of a step does with its counts. Experts get those of their slots, and all are cleared.

On a CPU one compiled call: between forward passes, which have filled the caches, torch's three take the host longer
than the work itself. Elsewhere they are queued on the device, without a sync.
"""

from __future__ import annotations

import torch

from equipoise.errors import LoadError
from equipoise.jit.addresses import int32_at, int64_at
from equipoise.jit.compile import kernel


class StepFold:
    """Folds and clears the counts of slots.

    Args:
        counts: (L, P + 1) int32 in C order, "none" in the last column. Its address never changes.
    """

    def __init__(self, counts: torch.Tensor) -> None:
        self._counts = counts
        self._slots = counts[:, :-1]
        self._on_cpu = counts.device.type == "cpu"
        self._map: torch.Tensor | None = None  # the live one, once its layout was looked at
        self._map_address = 0
        self._address = counts.data_ptr()
        if self._on_cpu:
            _fold_on_cpu(0, 0, 0, 0, 1, 0)  # of no layers: compiled, or loaded, before a step waits for it

    def fold_and_clear(self, row: torch.Tensor | None, physical_to_logical_map: torch.Tensor) -> None:
        """Adds the counts of each layer's slots to those of its experts, and sets all to 0.

        Args:
            row: (L, E) int64 in C order, that takes them; None: nobody does.
            physical_to_logical_map: (L, P) int64.

        Raises:
            LoadError: a map to what is no expert of ``row``; the counts of all other slots were added.
        """
        if physical_to_logical_map is not self._map:
            self._map = physical_to_logical_map
            self._map_address = self._address_of(physical_to_logical_map)
        if self._map_address:
            layers, columns = self._counts.shape
            to, experts = (0, 0) if row is None else (row.data_ptr(), row.shape[1])
            if not _fold_on_cpu(self._address, self._map_address, to, layers, columns, experts):
                raise LoadError(
                    f"physical_to_logical_map must hold experts from 0 to {experts - 1}, got "
                    f"{int(physical_to_logical_map.min())} to {int(physical_to_logical_map.max())}",
                    field="physical_to_logical_map",
                )
            return
        if row is not None:
            row.scatter_add_(1, physical_to_logical_map, self._slots.to(torch.int64))
        self._counts.zero_()

    def _address_of(self, mapping: torch.Tensor) -> int:
        """Where the kernel finds the map; 0 where it cannot read it: torch does, or says what is wrong."""
        readable = mapping.dtype == torch.int64 and mapping.shape == self._slots.shape and mapping.is_contiguous()
        return mapping.data_ptr() if self._on_cpu and readable else 0


@kernel
def _fold_on_cpu(counts_at: int, map_at: int, row_at: int, num_layers: int, num_columns: int, num_experts: int) -> bool:
    """Adds the counts of slots to those of their experts, and clears them; False if a slot's expert is none.

    Args:
        counts_at: address of (num_layers, num_columns) int32, "none" in the last column.
        map_at: address of (num_layers, num_columns - 1) int64 experts.
        row_at: address of (num_layers, num_experts) int64.
        num_experts: 0 where nothing is to be added.
    """
    counts = int32_at(counts_at, (num_layers, num_columns))
    experts = int64_at(map_at, (num_layers, num_columns - 1))
    row = int64_at(row_at, (num_layers, num_experts))
    valid = True
    for layer in range(num_layers):
        for slot in range(num_columns - 1):
            expert = experts[layer, slot]
            if 0 <= expert < num_experts:
                row[layer, expert] += counts[layer, slot]
            else:
                valid = valid and num_experts == 0
        for column in range(num_columns):
            counts[layer, column] = 0
    return valid
