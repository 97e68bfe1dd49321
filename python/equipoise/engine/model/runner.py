"""Runs the forward passes of one rank."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.profiler import record_function

from equipoise.config import EplbConfig, ServeConfig
from equipoise.engine.checkpoint.reader import Checkpoint
from equipoise.engine.model.blueprint import ModelBlueprint
from equipoise.engine.model.experts import EpContext, EpExperts
from equipoise.engine.model.kv_cache import RowKvCache
from equipoise.engine.model.step_batch import StepBatch
from equipoise.engine.model.weights import LoadReport, WeightLoader
from equipoise.transfer.execution.updater import ROUNDS_IN_FLIGHT
from equipoise.transfer.memory.pool import ExpertPool
from equipoise.transfer.memory.pooled import allocate_pool
from equipoise.transfer.memory.store import ExpertWeights


class ModelRunner:
    """A loaded model with its cache; also the host that balancing sees."""

    def __init__(self, blueprint: ModelBlueprint, rank: int, device: torch.device, config: ServeConfig) -> None:
        self._model: Any = blueprint.model
        self._rank = rank
        self._device = device
        self._experts = [module for _, module in blueprint.experts]
        self._names = [name for name, _ in blueprint.experts]
        self._cache = RowKvCache(config.engine.max_running_requests, blueprint.max_model_len)
        self._cache_keyword = cache_keyword(self._model)
        self._pool: ExpertPool | None = None
        self.load_report = self._load(blueprint, config.eplb)

    def _load(self, blueprint: ModelBlueprint, config: EplbConfig) -> LoadReport:
        mine = list(blueprint.topology.slots_of_rank(self._rank))
        slots = blueprint.metadata.physical_to_logical_map[:, mine].tolist()
        checkpoint = Checkpoint(blueprint.directory)
        try:
            loader = WeightLoader(self._model, blueprint.experts, checkpoint)
            specs = loader.expert_specs()
            if blueprint.experts_by_row and all(layer == specs[0] for layer in specs):
                self._pool = allocate_pool(
                    specs[0],
                    blueprint.topology,
                    len(specs),
                    verification=config.eplb_verification,
                    staging_bytes=config.eplb_staging_bytes,
                    rounds_in_flight=ROUNDS_IN_FLIGHT,
                    device=self._device,
                )
            return loader.load(slots, self._device, with_head=self._rank == 0, pool=self._pool)
        finally:
            checkpoint.close()

    def connect(self, context: EpContext) -> None:
        """Spreads the experts over the ranks: from now on a forward pass is collective."""
        for layer_id, (name, inner) in enumerate(zip(self._names, self._experts, strict=True)):
            parent, _, leaf = name.rpartition(".")
            rows = None if self._pool is None else self._pool.row_of_slot[layer_id]
            setattr(self._model.get_submodule(parent), leaf, EpExperts(inner, layer_id, context, rows))

    def expert_weights(self) -> ExpertWeights:
        """The pool that all layers share; or per MoE layer the tensors of its experts, (slots_per_rank, ...) each."""
        if self._pool is not None:
            return self._pool
        return [[parameter.data for parameter in inner.parameters(recurse=False)] for inner in self._experts]

    @torch.inference_mode()
    def forward(self, batch: StepBatch) -> torch.Tensor | None:
        """Run one step. Collective.

        Returns:
            Rank 0: (N, V) float32 logits, on the CPU, of the tokens that ``batch.logit_rows`` names. Other ranks: None.
        """
        with record_function("equipoise.engine.forward"):
            return self._forward(batch)

    def _forward(self, batch: StepBatch) -> torch.Tensor | None:
        layout = self._cache.begin_step(batch, self._device)
        inputs = {
            "input_ids": torch.tensor([batch.token_ids], dtype=torch.int64).to(self._device, non_blocking=True),
            "position_ids": layout.position_ids,
            self._cache_keyword: self._cache,
            "use_cache": True,
            "step_layout": layout,
        }
        if self._rank != 0:
            self._model.base_model(**inputs)
            return None
        logits: torch.Tensor = self._model(**inputs, logits_to_keep=layout.logit_tokens).logits
        return logits[0].float().cpu()


def cache_keyword(model: Any) -> str:
    """Name by which a model's forward takes its cache: transformers renames ``past_key_values``, which 5.40 refuses."""
    parameters = inspect.signature(type(model.base_model).forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"
