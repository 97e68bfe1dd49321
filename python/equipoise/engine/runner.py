"""The forward pass of one rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from equipoise.engine.blueprint import ModelBlueprint
from equipoise.engine.checkpoint import Checkpoint
from equipoise.engine.experts import EpContext, EpExperts
from equipoise.engine.kv_cache import RowKvCache
from equipoise.engine.layout import StepBatch
from equipoise.engine.weights import LoadReport, WeightLoader


class ModelRunner:
    """A loaded model with its cache; also the host that balancing sees (an ``EngineAdapter``)."""

    def __init__(self, blueprint: ModelBlueprint, rank: int, device: torch.device, max_running_requests: int) -> None:
        self._model: Any = blueprint.model
        self._rank = rank
        self._device = device
        self._experts = [module for _, module in blueprint.experts]
        self._names = [name for name, _ in blueprint.experts]
        self._cache = RowKvCache(max_running_requests, blueprint.max_model_len)
        self.load_report = self._load(blueprint)

    def _load(self, blueprint: ModelBlueprint) -> LoadReport:
        mine = list(blueprint.topology.slots_of_rank(self._rank))
        slots = blueprint.metadata.physical_to_logical_map[:, mine].tolist()
        checkpoint = Checkpoint(blueprint.directory)
        try:
            loader = WeightLoader(self._model, blueprint.experts, checkpoint)
            return loader.load(slots, self._device, with_head=self._rank == 0)
        finally:
            checkpoint.close()

    def connect(self, context: EpContext) -> None:
        """Spreads the experts over the ranks: from now on a forward pass is collective."""
        for layer_id, (name, inner) in enumerate(zip(self._names, self._experts, strict=True)):
            parent, _, leaf = name.rpartition(".")
            setattr(self._model.get_submodule(parent), leaf, EpExperts(inner, layer_id, context))

    def expert_weights(self) -> Sequence[Sequence[torch.Tensor]]:
        """Per MoE layer, the live tensors of its experts, each (slots_per_rank, ...)."""
        return [[parameter.data for parameter in inner.parameters(recurse=False)] for inner in self._experts]

    @torch.inference_mode()
    def forward(self, batch: StepBatch) -> torch.Tensor | None:
        """One step. Rank 0 gets the logits (num sampled, V) on the CPU, the others None."""
        layout = self._cache.begin_step(batch, self._device)
        inputs = {
            "input_ids": torch.tensor([batch.token_ids], dtype=torch.int64).to(self._device, non_blocking=True),
            "position_ids": layout.position_ids,
            "past_key_values": self._cache,
            "use_cache": True,
            "step_layout": layout,
        }
        if self._rank != 0:
            self._model.base_model(**inputs)
            return None
        logits: torch.Tensor = self._model(**inputs, logits_to_keep=layout.last_tokens).logits
        return logits[0].float().cpu()
