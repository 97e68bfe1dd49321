"""Loads what one rank needs of a checkpoint into a model built on the meta device."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.core_model_loading import dot_natural_key

from equipoise.engine.checkpoint.conversion import CheckpointConversion
from equipoise.engine.checkpoint.reader import Checkpoint
from equipoise.engine.model.experts import num_experts_of
from equipoise.errors import ModelError
from equipoise.transfer.memory.pool import ExpertPool

_log = logging.getLogger("equipoise.engine")


@dataclass(frozen=True)
class LoadReport:
    bytes_read: int
    expert_bytes_read: int  # of which for experts


class WeightLoader:
    """Fill a meta model for one rank.

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
        self._conversion = CheckpointConversion(model, checkpoint)

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
        """Read and place all parameters and buffers. Afterwards each experts module has one expert per slot.

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
        needed = {name for name in self._shapes if with_head or self._in_base_model(name)}
        tied = {target: origin for target, origin in self._model.all_tied_weights_keys.items() if target in needed}
        # A tied pair is read as far as the checkpoint has it: it may hold either, or both.
        stored = self._conversion.parameters
        wanted = needed | {
            target for target, origin in self._model.all_tied_weights_keys.items() if origin not in stored
        }
        placed: set[str] = set()
        for name in self._conversion.parameters:
            if name in wanted and name not in expert_layer:
                placed |= self._place(self._conversion.make(name), device)
        if with_head:  # one rank says it
            self._log_unused()
        dense_bytes = self._checkpoint.bytes_read
        for name, layer in expert_layer.items():
            if name in self._conversion.parameters:
                count, held = num_experts_of(self._experts[layer][1]), slots[layer]
                rows = None if pool is None else (pool, layer)
                placed |= self._place(
                    self._conversion.make_experts(name, count, held), device, held=len(held), rows=rows
                )
        placed |= self._tie(tied, placed)
        if missing := sorted(needed - placed, key=dot_natural_key):
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ModelError(f"the checkpoint lacks {', '.join(missing[:3])}{more}", field="model_path")
        for (_, module), held in zip(self._experts, slots, strict=True):
            module.num_experts = len(held) if pool is None else pool.num_rows  # type: ignore[assignment]
        return LoadReport(self._checkpoint.bytes_read, self._checkpoint.bytes_read - dense_bytes)

    def _log_unused(self) -> None:
        unused = self._conversion.unused_keys
        if unused:
            names = ", ".join(unused[:5]) + (", ..." if len(unused) > 5 else "")
            _log.warning("the model has no use for %d tensors of the checkpoint: %s", len(unused), names)

    def _tie(self, tied: Mapping[str, str], placed: set[str]) -> set[str]:
        """Let pairs that the configuration ties share one tensor, unless the checkpoint holds two that differ.

        Returns:
            The parameters that have got their tensor by it.
        """
        gained = set()
        for target, origin in tied.items():
            if target in placed and origin in placed:
                head, embedding = self._model.get_parameter(target), self._model.get_parameter(origin)
                if not torch.equal(head, embedding):
                    _log.warning("%s is kept: config.json ties it to %s, but the file holds another", target, origin)
                    continue
            source, taker = (target, origin) if target in placed and origin not in placed else (origin, target)
            if source in placed:
                self._set(taker, self._model.get_parameter(source))
                gained.add(taker)
        return gained

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
