"""Holds the experts of one rank in tensors of each layer, as engines have them: commits copy into them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from equipoise.config import Verification
from equipoise.transfer.memory.host_weights import ExpertTensor, require_usable, row_views, with_canary
from equipoise.transfer.memory.staging import ExpertLayout, SendBuffer, StagedExpert, StagingArea
from equipoise.transfer.planning.rank_program import Copy, is_staging, staging_index


class StackedExperts:
    """Holds experts in tensors of each layer, row ``i`` for slot ``i``; commits copy into them.

    Args:
        expert_weights: ``[layer][i]``: (slots_per_rank, ...) each, or a list of slots_per_rank tensors.
        verification, staging_bytes: see ``ExpertLocationUpdater``.
        default_staged: experts that staging holds where ``staging_bytes`` is None.
        num_send_buffers: experts that may be on their way out at once.

    Raises:
        ConfigError: unusable tensors, or a budget below one expert.
    """

    def __init__(
        self,
        expert_weights: Sequence[Sequence[ExpertTensor]],
        slots_per_rank: int,
        verification: Verification,
        staging_bytes: int | None,
        *,
        default_staged: int,
        num_send_buffers: int,
    ) -> None:
        require_usable(expert_weights, slots_per_rank)
        self.device = expert_weights[0][0][0].device if expert_weights else torch.device("cpu")
        weights = [with_canary(tensors, verification) for tensors in expert_weights]
        self._canaries: list[torch.Tensor] = []
        if verification != "off":
            self._canaries = [tensors[-1] for tensors in weights]  # type: ignore[misc]
        self._rows = [
            [list(rows) for rows in zip(*(row_views(tensor) for tensor in tensors), strict=True)] for tensors in weights
        ]
        self.layouts = [ExpertLayout.of(tensors, with_checksum=verification == "checksum") for tensors in weights]
        self._staging = StagingArea(
            self.layouts, staging_bytes, default_staged, slots_per_rank, num_send_buffers, self.device
        )

    @property
    def capacity(self) -> int:
        return self._staging.capacity

    @property
    def allocated_bytes(self) -> int:
        return self._staging.allocated_bytes

    def reserve(self, num_slots: int) -> None:
        self._staging.reserve(num_slots)

    def release(self) -> None:
        self._staging.release()

    def live(self, layer_id: int, slot: int) -> list[torch.Tensor]:
        return self._rows[layer_id][slot]

    def staged(self, layer_id: int, index: int) -> StagedExpert:
        return self._staging.slot(layer_id, index)

    def send_buffer(self, layer_id: int, index: int) -> SendBuffer:
        return self._staging.send_buffer(layer_id, index)

    # Hazard: a host may have loaded its weights inside torch.inference_mode(); only there can they be written.
    @torch.inference_mode()
    def commit(self, layer_id: int, copies: Sequence[Copy]) -> None:
        for copy in copies:
            targets, sources = self._rows_at(layer_id, copy.destination), self._rows_at(layer_id, copy.source)
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)

    def canaries(self, layer_id: int) -> list[int]:
        return [int(value) for value in self._canaries[layer_id].tolist()] if self._canaries else []

    @torch.inference_mode()
    def set_canaries(self, layer_id: int, values: Sequence[int]) -> None:
        if self._canaries:
            self._canaries[layer_id].copy_(torch.tensor(values))

    def _rows_at(self, layer_id: int, place: int) -> list[torch.Tensor]:
        return self.staged(layer_id, staging_index(place)).rows if is_staging(place) else self._rows[layer_id][place]
