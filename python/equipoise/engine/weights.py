"""Loading what one rank needs of a checkpoint into a model built on the meta device.

Checkpoints on disk may name and cut their tensors differently from the model (one tensor per expert and projection,
say). transformers keeps for each family a list of transforms from the one to the other; they are used here as they
are, but fed with the tensors of this rank's experts only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from equipoise.engine.checkpoint import Checkpoint
from equipoise.engine.experts import num_experts_of
from equipoise.errors import ModelError
from equipoise.expert_pool import ExpertPool

Read = Callable[[str, str], Sequence[Callable[[], torch.Tensor]]]
"""Readers of the tensors that a pattern's key stands for; a transform calls them when it needs them."""


@dataclass
class _Source:
    """The checkpoint's tensors that make up one parameter."""

    transform: WeightConverter | WeightRenaming
    keys: dict[str, list[str]] = field(default_factory=dict)  # by the transform's pattern, in natural order

    @property
    def merges_experts(self) -> bool:
        """Each key is one expert's tensor; the transform stacks them."""
        return any(isinstance(op, MergeModulelist) for op in getattr(self.transform, "operations", ()))


@dataclass(frozen=True)
class LoadReport:
    bytes_read: int
    expert_bytes_read: int  # of which for experts


class WeightLoader:
    """Fills a meta model for one rank.

    Args:
        model: a transformers model on the meta device, its experts modules still whole.
        experts: their names and modules, by MoE layer.
        checkpoint: where the tensors come from.
    """

    def __init__(self, model: Any, experts: Sequence[tuple[str, torch.nn.Module]], checkpoint: Checkpoint) -> None:
        self._model = model
        self._experts = experts
        self._checkpoint = checkpoint
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._dtypes = {name: _target_dtype(model, name, tensor) for name, tensor in model.state_dict().items()}
        self._sources = self._match()

    def expert_specs(self) -> list[list[tuple[torch.Size, torch.dtype]]]:
        """Per MoE layer, shape and dtype of each tensor of one expert, in the order of its module's parameters."""
        return [
            [(p.shape[1:], self._dtypes[f"{name}.{leaf}"]) for leaf, p in module.named_parameters(recurse=False)]
            for name, module in self._experts
        ]

    def load(
        self,
        slots: Sequence[Sequence[int]],
        device: torch.device,
        *,
        with_head: bool,
        pool: ExpertPool | None = None,
    ) -> LoadReport:
        """Reads and places all parameters and buffers. Afterwards each experts module has one expert per slot.

        Args:
            slots: per MoE layer, the logical expert of each of this rank's slots.
            with_head: whether this rank needs what lies outside the base model (the LM head).
            pool: where the experts go, if they share their rows: afterwards each experts module has the pool's tensors
                for parameters, and one expert per row.

        Raises:
            ModelError: the checkpoint lacks a parameter, or holds one of another shape.
        """
        # First, while parameters have no storage: what fills the buffers would draw new weights beside them.
        _fill_computed_buffers(self._model, device)
        expert_layer = {
            f"{name}.{parameter}": layer
            for layer, (name, module) in enumerate(self._experts)
            for parameter, _ in module.named_parameters(recurse=False)
        }
        tied = self._model.all_tied_weights_keys
        wanted = {name for name in self._shapes if name not in tied and (with_head or self._in_base_model(name))}
        placed: set[str] = set()
        for name, source in self._sources.items():
            if name in wanted and name not in expert_layer:
                placed |= self._place(self._convert(name, source, self._whole), device)
        dense_bytes = self._checkpoint.bytes_read
        for name, layer in expert_layer.items():
            if name in self._sources:
                placed |= self._place_experts(name, self._sources[name], layer, slots[layer], device, pool)
        if missing := sorted(wanted - placed, key=dot_natural_key):
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ModelError(f"the checkpoint lacks {', '.join(missing[:3])}{more}", field="model_path")
        for (_, module), held in zip(self._experts, slots, strict=True):
            module.num_experts = len(held) if pool is None else pool.num_rows  # type: ignore[assignment]
        for target, origin in tied.items():
            if target in self._shapes and (with_head or self._in_base_model(target)):
                self._set(target, self._model.get_parameter(origin))
        return LoadReport(self._checkpoint.bytes_read, self._checkpoint.bytes_read - dense_bytes)

    def _match(self) -> dict[str, _Source]:
        """Sorts the checkpoint's keys by the parameter they belong to; keys the model has no use for are left out."""
        transforms = get_model_conversion_mapping(self._model)
        renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        prefix, known = self._model.base_model_prefix, self._shapes
        sources: dict[str, _Source] = {}
        for key in sorted(self._checkpoint.keys(), key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, known)
            if name not in known and key in known:
                name, pattern = key, None
            if name not in known:
                continue
            if name not in sources:
                transform = WeightRenaming(key, name) if pattern is None else deepcopy(by_pattern[pattern])
                sources[name] = _Source(transform)
            sources[name].keys.setdefault(pattern or key, []).append(key)
        return sources

    def _convert(self, name: str, source: _Source, read: Read) -> dict[str, torch.Tensor]:
        transform = source.transform
        for pattern, keys in source.keys.items():
            for key in keys:
                for reader in read(pattern, key):
                    transform.add_tensor(name, key, pattern, reader)
        try:
            made = transform.convert(name, model=self._model, config=self._model.config)
        except (ValueError, RuntimeError, KeyError) as error:
            raise ModelError(f"{name} cannot be made from the checkpoint: {error}", field="model_path") from None
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}

    def _whole(self, _pattern: str, key: str) -> Sequence[Callable[[], torch.Tensor]]:
        return [lambda: self._checkpoint.read(key)]

    def _place_experts(
        self,
        name: str,
        source: _Source,
        layer: int,
        held: Sequence[int],
        device: torch.device,
        pool: ExpertPool | None,
    ) -> set[str]:
        count = num_experts_of(self._experts[layer][1])
        if source.merges_experts:
            for pattern, keys in source.keys.items():
                if len(keys) != count:
                    raise ModelError(
                        f"{name} needs {count} experts, the checkpoint has {len(keys)} of {pattern}", field="model_path"
                    )
                source.keys[pattern] = [keys[expert] for expert in held]
            made = self._convert(name, source, self._whole)
        else:
            for keys in source.keys.values():
                for key in keys:
                    if self._checkpoint.shape(key)[0] != count:
                        shape = self._checkpoint.shape(key)
                        raise ModelError(f"{key} must hold {count} experts, has shape {shape}", field="model_path")
            made = self._convert(name, source, lambda _, key: [lambda: self._checkpoint.read_rows(key, held)])
        return self._place(made, device, held=len(held), rows=None if pool is None else (pool, layer))

    def _place(
        self,
        made: dict[str, torch.Tensor],
        device: torch.device,
        *,
        held: int | None = None,
        rows: tuple[ExpertPool, int] | None = None,
    ) -> set[str]:
        """``held``: experts, if these are tensors of experts; ``rows``: the pool for them and their layer."""
        for name, tensor in made.items():
            if name not in self._shapes:
                continue
            shape = self._shapes[name] if held is None else (held, *self._shapes[name][1:])
            if tuple(tensor.shape) != shape:
                raise ModelError(
                    f"{name} must have shape {shape}, the checkpoint has {tuple(tensor.shape)}", field="model_path"
                )
            if rows is None:
                self._set(name, tensor.to(device=device, dtype=self._dtypes[name]).contiguous())
            else:
                self._set(name, self._in_pool(name, tensor, *rows))
        return set(made)

    def _in_pool(self, name: str, tensor: torch.Tensor, pool: ExpertPool, layer: int) -> torch.Tensor:
        """Writes a layer's experts to their first rows; the pool's tensor."""
        leaves = [leaf for leaf, _ in self._experts[layer][1].named_parameters(recurse=False)]
        common = pool.tensors[leaves.index(name.rpartition(".")[2])]
        common[pool.rows(layer)] = tensor.to(device=common.device, dtype=common.dtype)
        return common

    def _set(self, name: str, tensor: torch.Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(path)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
        else:
            module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)

    def _in_base_model(self, name: str) -> bool:
        return name.startswith(f"{self._model.base_model_prefix}.")


def _target_dtype(model: Any, name: str, tensor: torch.Tensor) -> torch.dtype:
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    loose = (getattr(model, "_keep_in_fp32_modules", None) or ()) if tensor.dtype == torch.float16 else ()
    if tensor.is_floating_point() and any(part in name for part in (*strict, *loose)):
        return torch.float32
    return tensor.dtype


@torch.no_grad()
def _fill_computed_buffers(model: Any, device: torch.device) -> None:
    """Gives the buffers that no checkpoint stores (rotary frequencies) the values the model computes for them."""
    for module in model.modules():
        names = [name for name in module._non_persistent_buffers_set if _on_meta(module._buffers.get(name))]
        if not names:
            continue
        for name in names:
            module._buffers[name] = torch.full_like(module._buffers[name], float("nan"), device="cpu")
        model._init_weights(module)
        for name in names:
            buffer = module._buffers[name]
            if buffer.is_floating_point() and buffer.isnan().any():
                raise ModelError(f"{type(module).__name__}.{name} has no known first value", field="model_path")
            module._buffers[name] = buffer.to(device)


def _on_meta(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.is_meta
