"""Makes a model's parameters from the tensors of its checkpoint, whole or for some experts only.

Checkpoints on disk may name and cut their tensors differently from the model (one tensor per expert and projection,
say). transformers keeps for each family a list of transforms from the one to the other; they are used here as they
are, but fed with the tensors of the wanted experts only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
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

from equipoise.engine.checkpoint.quantization import (
    QUANTIZED_DTYPES,
    dequantizer,
    holds_quantized_data,
    with_partial_blocks,
)
from equipoise.engine.checkpoint.reader import Checkpoint
from equipoise.errors import ModelError


@dataclass
class _Source:
    """The checkpoint's tensors that make up one parameter."""

    transform: WeightConverter | WeightRenaming
    keys: dict[str, list[str]] = field(default_factory=dict)  # by the transform's pattern, in natural order

    @property
    def merges_experts(self) -> bool:
        """Each key is one expert's tensor; the transform stacks them."""
        return any(isinstance(op, MergeModulelist) for op in getattr(self.transform, "operations", ()))


class CheckpointConversion:
    """From a checkpoint to the parameters of a model, one by one: what was read is not kept.

    Args:
        model: a transformers model on the meta device.
        checkpoint: where the tensors come from.

    Attributes:
        parameters: names of those that the checkpoint has tensors for, in natural order of its keys.
        unused_keys: tensors that the model has no use for, but for those that its family is known to leave out.

    Raises:
        ModelError: a part of a quantised weight would be left out, or taken for the weight itself.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._quantizer = dequantizer(model.config)
        self.unused_keys: list[str] = []
        self._sources = self._match()
        self.parameters = self._sources.keys()
        self._refuse_quantized_leftovers()

    def make(self, name: str) -> dict[str, torch.Tensor]:
        """A parameter, and what else the same tensors give, by name; on the CPU, of the checkpoint's dtype.

        Raises:
            ModelError: the tensors do not fit together, or cannot be read.
        """
        source = self._sources[name]
        return self._convert(name, source.transform, source.keys, self._checkpoint.read)

    def make_experts(self, name: str, num_experts: int, held: Sequence[int]) -> dict[str, torch.Tensor]:
        """As :meth:`make`, of a parameter that stacks experts along its first dimension: (len(held), ...).

        Args:
            num_experts: that the whole parameter has.
            held: the logical experts that are wanted, in this order; no others are read.

        Raises:
            ModelError: the checkpoint has another number of experts; or as for :meth:`make`.
        """
        source = self._sources[name]
        if source.merges_experts:
            for pattern, keys in source.keys.items():
                if len(keys) != num_experts:
                    raise ModelError(
                        f"{name} needs {num_experts} experts, the checkpoint has {len(keys)} of {pattern}",
                        field="model_path",
                    )
            wanted = {pattern: [keys[expert] for expert in held] for pattern, keys in source.keys.items()}
            return self._convert(name, source.transform, wanted, self._checkpoint.read)
        for key in (key for keys in source.keys.values() for key in keys):
            shape = self._checkpoint.shape(key)
            if shape[0] != num_experts:
                raise ModelError(f"{key} must hold {num_experts} experts, has shape {shape}", field="model_path")
        return self._convert(name, source.transform, source.keys, lambda key: self._checkpoint.read_rows(key, held))

    def _match(self) -> dict[str, _Source]:
        """Sort the checkpoint's keys by the parameter they belong to; the others become ``unused_keys``."""
        transforms = with_partial_blocks(get_model_conversion_mapping(self._model, hf_quantizer=self._quantizer))
        ignored = [re.compile(pattern) for pattern in self._model._keys_to_ignore_on_load_unexpected or ()]
        renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        prefix, known = self._model.base_model_prefix, self._model.state_dict()
        sources: dict[str, _Source] = {}
        for key in sorted(self._checkpoint.keys(), key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, known)
            if name not in known and key in known:
                name, pattern = key, None
            if name not in known:
                if not any(pattern.search(key) for pattern in ignored):
                    self.unused_keys.append(key)
                continue
            if name not in sources:
                transform = WeightRenaming(key, name) if pattern is None else deepcopy(by_pattern[pattern])
                sources[name] = _Source(transform)
            sources[name].keys.setdefault(pattern or key, []).append(key)
        return sources

    def _refuse_quantized_leftovers(self) -> None:
        """A scale that no conversion takes, or raw fp8 without one: the weight would load, and answer garbage."""
        used = [
            key
            for source in self._sources.values()
            if isinstance(source.transform, WeightRenaming) or self._quantizer is None
            for keys in source.keys.values()
            for key in keys
        ]
        for key in [*self.unused_keys, *used]:
            if holds_quantized_data(key, self._checkpoint.dtype(key)) and not self._is_parameter(key):
                raise ModelError(
                    f"{key} ({self._checkpoint.dtype(key)}) is part of a quantised weight, but config.json has no "
                    "quantization_config that says how to read it",
                    field="model_path",
                )

    def _is_parameter(self, key: str) -> bool:
        """Whether the model itself has a full-precision parameter of this name, which merely ends like a scale."""
        return self._checkpoint.dtype(key) not in QUANTIZED_DTYPES and key in self._model.state_dict()

    def _convert(
        self,
        name: str,
        transform: WeightConverter | WeightRenaming,
        keys_of: Mapping[str, Sequence[str]],
        read: Callable[[str], torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        for pattern, keys in keys_of.items():
            for key in keys:
                transform.add_tensor(name, key, pattern, partial(read, key))  # it reads when it needs the tensor
        try:
            made = transform.convert(name, model=self._model, config=self._model.config)
        except (ValueError, RuntimeError, KeyError) as error:
            raise ModelError(f"{name} cannot be made from the checkpoint: {error}", field="model_path") from None
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}
