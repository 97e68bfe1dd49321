"""LivePlacement: the placement in force, on the device and on the CPU, and who follows it when layers change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from equipoise.dispatch.dispatcher import ExpertDispatcher
from equipoise.errors import ConfigError
from equipoise.placement.metadata import ExpertLocationMetadata


@dataclass(frozen=True, eq=False)
class LayersCommitted:
    """Layers whose experts or dispatch weights have just changed: a host's own maps follow now."""

    layer_ids: list[int]  # the host's numbers
    rows: list[int]  # their rows in the arrays of ``placement``
    placement: ExpertLocationMetadata  # in force from now on, on the CPU; not to be changed


OnLayersCommitted = Callable[[LayersCommitted], None]


class LivePlacement:
    """Changes both copies together, so that nobody ever reads a map back from the device.

    Args:
        metadata: the live placement, changed in place.
        layer_ids: the host's number of each row; None: 0 to L - 1.
        dispatcher: refreshed with each change; None where the host dispatches itself.
        on_layers_committed: called with each change, before anything else runs.

    Attributes:
        metadata: as given.
        committed: the same placement on the CPU (the same object where the live one is there already).
        layer_ids: the host's number of each row.

    Raises:
        ConfigError: ``layer_ids`` that do not name each row once.
    """

    def __init__(
        self,
        metadata: ExpertLocationMetadata,
        layer_ids: Sequence[int] | None = None,
        *,
        dispatcher: ExpertDispatcher | None = None,
        on_layers_committed: OnLayersCommitted | None = None,
    ) -> None:
        self.layer_ids = list(range(metadata.num_layers) if layer_ids is None else layer_ids)
        if len(set(self.layer_ids)) != metadata.num_layers or min(self.layer_ids) < 0:
            raise ConfigError(
                f"layer_ids must be {metadata.num_layers} different numbers from 0 on, one for each MoE layer, "
                f"got {self.layer_ids}",
                field="layer_ids",
            )
        self.metadata = metadata
        on_cpu = metadata.physical_to_logical_map.device.type == "cpu"
        self.committed = metadata if on_cpu else metadata.clone("cpu")
        self._dispatcher = dispatcher
        self._on_layers_committed = on_layers_committed
        device = metadata.physical_to_logical_map.device
        in_order = self.layer_ids == list(range(metadata.num_layers))
        self._host_rows = None if in_order else torch.tensor(self.layer_ids, device=device)

    def snapshot(self) -> ExpertLocationMetadata:
        """A copy that a planner's thread may read while layers commit."""
        return self.committed.clone()

    def rows_of_host(self, values: torch.Tensor) -> torch.Tensor:
        """The MoE layers' rows of a tensor with a row for every layer of the host; no sync."""
        return values if self._host_rows is None else values.index_select(0, self._host_rows)

    def commit(self, target: ExpertLocationMetadata, rows: list[int]) -> None:
        """Takes over some layers of a placement, weights included."""
        self.metadata.update_layers_(target, rows)
        if self.committed is not self.metadata:
            self.committed.update_layers_(target, rows)
        self._tell(rows)

    def commit_map(self, row: int, physical_to_logical_map: np.ndarray) -> None:
        """Takes over one layer's (P,) map, with uniform dispatch weights."""
        self.metadata.update_layer_(row, physical_to_logical_map)
        if self.committed is not self.metadata:
            self.committed.update_layer_(row, physical_to_logical_map)
        self._tell([row])

    def _tell(self, rows: list[int]) -> None:
        if self._dispatcher is not None:
            self._dispatcher.refresh(rows)
        if self._on_layers_committed is not None and rows:
            ids = [self.layer_ids[row] for row in rows]
            self._on_layers_committed(LayersCommitted(ids, list(rows), self.committed))
