"""Dequantises fp8 and MXFP4 checkpoints through transformers' own quantisers, expert by expert.

A quantiser brings weight conversions that combine a weight with its scales (``weight`` with ``weight_scale_inv``,
``_blocks`` with ``_scales``) and run before experts are stacked, so that a rank reads its own experts only.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.core_model_loading import WeightConverter
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.auto import AutoHfQuantizer

from equipoise.errors import ModelError

DEQUANTIZED_METHODS = ("fp8", "mxfp4")
"""Values of ``quant_method`` that are loaded: block-scaled fp8 (DeepSeek-V3) and MXFP4 (gpt-oss)."""

_SCALE_ENDINGS = ("_scale", "_scales", "_scale_inv", ".scale", ".scales", "_blocks", ".qweight", ".qzeros", "_absmax")
QUANTIZED_DTYPES = ("I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4")  # as safetensors names them


def dequantizer(model_config: Any) -> Any | None:
    """Make transformers' quantiser for a configuration, set to dequantise; None where nothing is quantised.

    Raises:
        ModelError: a method that is not served.
    """
    settings = getattr(model_config, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    method = str(getattr(method, "value", method))
    if method not in DEQUANTIZED_METHODS:
        raise ModelError(
            f"quant_method must be one of {', '.join(DEQUANTIZED_METHODS)} (loaded dequantised) or none, "
            f"config.json says {method}",
            field="model_path",
        )
    try:
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"quantization_config of config.json cannot be used: {error}", field="model_path") from None
    quantizer.quantization_config.dequantize = True
    return quantizer


def with_partial_blocks(transforms: list[Any]) -> list[Any]:
    """Replace transformers' fp8 operation, in place, by one that takes blocks that reach past a weight's edge."""
    for transform in transforms:
        if isinstance(transform, WeightConverter):
            transform.operations = [
                _DequantizePartialBlocks(op.hf_quantizer) if type(op) is Fp8Dequantize else op
                for op in transform.operations
            ]
    return transforms


def holds_quantized_data(key: str, dtype: str) -> bool:
    """Whether a tensor of a checkpoint looks like a part of a quantised weight; ``dtype`` in safetensors' words."""
    return dtype in QUANTIZED_DTYPES or key.endswith(_SCALE_ENDINGS)


class _DequantizePartialBlocks(Fp8Dequantize):
    """Dequantise with the block size that the configuration names.

    transformers 5.19 derives the block from the shapes: of 24 rows with two scales it makes blocks of 12, though blocks
    of 16 were meant, and 576 rows in blocks of 128 (DeepSeek-V3) it cannot divide.
    """

    def _dequantize_one(
        self, quantized: torch.Tensor, scales: torch.Tensor, output_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        block = getattr(self.hf_quantizer.quantization_config, "weight_block_size", None)
        rows, columns = quantized.shape[-2:]
        if block is None or scales.ndim != 2 or scales.shape != (-(-rows // block[0]), -(-columns // block[1])):
            # Per tensor, or experts in packed 4 bits beside fp8 matrices, which have a block of their own.
            whole: torch.Tensor = super()._dequantize_one(quantized, scales, output_dtype)
            return whole
        # The last blocks may reach past the weight's edge.
        scale = scales.float().repeat_interleave(block[0], dim=0).repeat_interleave(block[1], dim=1)
        return (quantized.float() * scale[:rows, :columns]).to(output_dtype or torch.bfloat16)
