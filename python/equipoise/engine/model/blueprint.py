"""What is known of a model before any weight is read: made once, before the ranks are forked, so that they share it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from equipoise.algorithms.registry import check_algorithm
from equipoise.config import EngineConfig, ServeConfig
from equipoise.engine.checkpoint.files import model_directory
from equipoise.engine.checkpoint.model_config import one_line, read_config
from equipoise.engine.checkpoint.reader import Checkpoint
from equipoise.engine.model.attention import ATTENTION_NAME, register_attention
from equipoise.engine.model.experts import experts_are_replaceable, find_experts, num_experts_of
from equipoise.engine.model.initial_placement import first_placement
from equipoise.engine.model.row_experts import ROW_EXPERTS_NAME, register_row_experts
from equipoise.errors import ConfigError, ModelError
from equipoise.manager.host import HostTraits
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology

# Frequencies that follow the longest sequence of a batch: requests in a packed step would change each other's.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "dense", "moe", "sparse")


@dataclass(frozen=True)
class ModelBlueprint:
    """A model on the meta device with everything that can be decided, and refused, before loading."""

    directory: Path
    config: Any  # transformers' config of the model
    model: Any  # transformers' model, parameters on the meta device
    experts: tuple[tuple[str, torch.nn.Module], ...]  # names and modules of the MoE layers
    metadata: ExpertLocationMetadata  # the first placement, CPU
    num_groups: int | None  # of group-limited routing
    experts_by_row: bool  # whether experts modules find an expert by its row in tensors of any length (row_experts.py)
    device_type: str  # cpu or cuda
    dtype: torch.dtype
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_model_len: int

    @property
    def topology(self) -> EpTopology:
        return self.metadata.topology

    @classmethod
    def prepare(cls, config: ServeConfig) -> ModelBlueprint:
        """Reads the model's configuration and lays out ranks and experts.

        Raises:
            ModelError: the directory is missing or incomplete, or holds a model that cannot be served.
            ConfigError, PlacementError: an option that does not fit the model or the machine.
        """
        dispatch = HostTraits().planned_dispatch(config.eplb)
        check_algorithm(config.eplb.eplb_algorithm, field="eplb_algorithm", dispatch=dispatch)
        directory = model_directory(config.engine.model_path)
        device_type = _device_type(config.engine)
        model_config = read_config(directory)
        dtype = _dtype(config.engine, device_type, model_config)
        model = _build_on_meta(model_config, dtype, device_type)
        _refuse_unsupported(model, model_config)
        experts = tuple(find_experts(model))
        text_config = model_config.get_text_config()
        groups = getattr(text_config, "n_group", None)
        num_groups = groups if isinstance(groups, int) and groups > 1 else None
        positions = getattr(text_config, "max_position_embeddings", None)
        length = config.engine.max_model_len
        Checkpoint(directory).close()  # a missing or truncated file is found before the ranks start
        return cls(
            directory=directory,
            config=model_config,
            model=model,
            experts=experts,
            metadata=first_placement(config, len(experts), num_experts_of(experts[0][1]), num_groups),
            num_groups=num_groups,
            experts_by_row=device_type == "cpu" and _find_experts_by_row(model, experts),
            device_type=device_type,
            dtype=dtype,
            vocab_size=text_config.vocab_size,
            eos_token_ids=_eos_token_ids(directory, text_config),
            max_model_len=min(length, positions) if isinstance(positions, int) else length,
        )


def _device_type(config: EngineConfig) -> str:
    if config.device == "cpu":
        return "cpu"
    devices = torch.cuda.device_count() if torch.backends.cuda.is_built() else 0
    if config.device == "cuda" and devices < config.ep_size:
        raise ConfigError(
            f"device=cuda needs one GPU per rank: ep_size={config.ep_size}, found {devices} GPUs", field="device"
        )
    return "cuda" if devices >= config.ep_size else "cpu"


def _dtype(config: EngineConfig, device_type: str, model_config: Any) -> torch.dtype:
    if config.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[config.dtype]
    stored = getattr(model_config, "dtype", None)
    return stored if device_type == "cuda" and isinstance(stored, torch.dtype) else torch.float32


def _build_on_meta(config: Any, dtype: torch.dtype, device_type: str) -> Any:
    register_attention()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=ATTENTION_NAME, trust_remote_code=False
            )
    except Exception as error:  # an unknown architecture, a field it cannot work with
        raise ModelError(f"{config.model_type} cannot be built: {one_line(error)}", field="model_path") from None
    if device_type == "cuda" and dtype != torch.bfloat16 and model._can_set_experts_implementation():
        # Grouped matrix products, the default, exist on CUDA for bfloat16 only.
        model.set_experts_implementation("eager")
    model.eval()
    return model


def _find_experts_by_row(model: Any, experts: Sequence[tuple[str, torch.nn.Module]]) -> bool:
    """Has the experts modules use our implementation; False where they do not let theirs be replaced."""
    if not (model._can_set_experts_implementation() and experts_are_replaceable(experts)):
        return False
    register_row_experts()
    model.set_experts_implementation(ROW_EXPERTS_NAME)
    return True


def _refuse_unsupported(model: Any, config: Any) -> None:
    family = type(model).__name__
    text_config = config.get_text_config()
    kinds = set(getattr(text_config, "layer_types", None) or ()) - set(_LAYER_TYPES)
    if kinds or getattr(model, "_is_stateful", False):
        kind = ", ".join(sorted(kinds)) or "state-space or linear-attention layers"
        raise ModelError(f"{family} has layers of a kind that is not served: {kind}", field="model_path")
    if not getattr(model, "_supports_attention_backend", False):
        raise ModelError(f"{family} does not let its attention be replaced", field="model_path")
    if getattr(text_config, "zero_expert_num", None):
        raise ModelError(f"{family} has experts without weights, which are not served", field="model_path")
    for module in model.modules():
        rope = getattr(module, "rope_type", None)  # a name, or one per kind of layer
        names = [rope] if isinstance(rope, str) else list(rope.values()) if isinstance(rope, dict) else []
        if any(name in _LENGTH_DEPENDENT_ROPE for name in names):
            raise ModelError(f"{family}: rotary embeddings of type {rope} are not served", field="model_path")


def _eos_token_ids(directory: Path, text_config: Any) -> tuple[int, ...]:
    eos = getattr(text_config, "eos_token_id", None)
    generation = directory / "generation_config.json"
    if generation.is_file():
        try:
            eos = json.loads(generation.read_text()).get("eos_token_id", eos)
        except (ValueError, AttributeError) as error:
            raise ModelError(f"{generation} is not a JSON object: {error}", field="model_path") from None
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (int(eos),)
