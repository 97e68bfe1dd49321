"""Attention over a packed step, registered with transformers as an attention implementation.

transformers builds no mask for an implementation it has no mask function for, and passes the model's own scaling,
sliding window and sinks along; the layout of the step comes as the keyword ``step_layout``.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from equipoise.engine.layout import StepLayout

ATTENTION_NAME = "equipoise_packed"


def register_attention() -> None:
    """Makes ``attn_implementation=ATTENTION_NAME`` known to transformers in this process."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, packed_attention)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    step_layout: StepLayout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    **_kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Each request's new tokens look at that request's context only.

    Args:
        query: (1, Hq, T, D) of the new tokens. key: (1, Hk, C, D), value: (1, Hk, C, Dv) of all contexts, Hk
            dividing Hq.
        sliding_window: tokens that a token may look back on, itself included.
        s_aux: (Hq,) logits of the attention sinks.

    Returns:
        (1, T, Hq, Dv), and no weights.
    """
    if attention_mask is not None or position_bias is not None or getattr(module, "is_causal", True) is False:
        raise NotImplementedError("attention with a mask or bias of its own")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    outputs = []
    count, width = step_layout.num_decode, step_layout.decode_width
    if count:
        # (1, H, count * width, D) -> (count, H, width, D)
        keys = key[0, :, : count * width].unflatten(1, (count, width)).transpose(0, 1)
        values = value[0, :, : count * width].unflatten(1, (count, width)).transpose(0, 1)
        queries = query[0, :, :count].transpose(0, 1).unsqueeze(2)
        mask = step_layout.decode_mask(sliding_window)
        outputs.append(_attend(queries, keys, values, mask, scale, s_aux, softcap)[:, :, 0].transpose(0, 1))
    for index, span in enumerate(step_layout.prefills):
        queries = query[:, :, span.query_start : span.query_start + span.query_length]
        keys = key[:, :, span.context_start : span.context_start + span.context_length]
        values = value[:, :, span.context_start : span.context_start + span.context_length]
        window = sliding_window if sliding_window is None or sliding_window < span.context_length else None
        if window is None and span.query_length == span.context_length and s_aux is None and softcap is None:
            outputs.append(_whole_prompt(queries, keys, values, scale)[0])
        else:
            mask = step_layout.prefill_mask(index, window)
            outputs.append(_attend(queries, keys, values, mask, scale, s_aux, softcap)[0])
    # Each (Hq, tokens, Dv) -> (1, T, Hq, Dv)
    return torch.cat(outputs, dim=1).transpose(0, 1)[None].contiguous(), None


def _whole_prompt(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Plain causal attention, which has kernels that need no mask."""
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    sinks: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    """(B, Hq, Q, D) with (B, Hk, K, D) to (B, Hq, Q, Dv)."""
    groups = query.shape[1] // key.shape[1]
    plain = sinks is None and softcap is None
    if groups > 1 and not (plain and (mask is None or query.device.type == "cpu")):
        # The CUDA kernels that take a mask do not share keys among heads.
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if plain:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
    logits = (query @ key.transpose(2, 3)).float() * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        # A sink takes part in the softmax and gives nothing to the sum.
        sink = sinks.float().reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., : key.shape[2]].to(value.dtype)
    return weights @ value
