"""Attention over a packed step, registered with transformers as an attention implementation.

transformers passes the model's own scaling and sinks along, and in place of a mask what our mask function made
(visibility.py); the layout of the step comes as the keyword ``step_layout``.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from equipoise.engine.model.contexts import contexts_of
from equipoise.engine.model.step_batch import StepLayout
from equipoise.engine.model.visibility import CAUSAL, UNKNOWN, Visibility, visibility_of_mask

ATTENTION_NAME = "equipoise_packed"


def register_attention() -> None:
    """Make ``attn_implementation=ATTENTION_NAME`` known to transformers in this process."""
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, visibility_of_mask)
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, packed_attention)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Visibility | None,
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
        attention_mask: what each token may attend to. None from models that build no mask through transformers.
        sliding_window: tokens that a token may look back on, itself included. Looked at only without a mask: there
            it cannot be known whether it holds.
        s_aux: (Hq,) logits of the attention sinks.

    Returns:
        (1, T, Hq, Dv), and no weights.
    """
    if position_bias is not None or getattr(module, "is_causal", True) is False:
        raise NotImplementedError("attention that is not causal, or with a bias")
    if attention_mask is None and sliding_window is not None:
        raise NotImplementedError("a sliding window without a mask function")
    if not isinstance(attention_mask, Visibility | None):
        raise NotImplementedError("attention with a mask of its own")
    visibility = attention_mask or CAUSAL
    if visibility == UNKNOWN:
        raise NotImplementedError("attention with a mask that is neither causal, nor sliding, nor chunked")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    outputs = []  # each (tokens, Hq, Dv)
    for run in step_layout.runs:
        visible = visibility.within(run.width)
        first = run.first_visible(visible)
        keys, values = (contexts_of(run, first, states) for states in (key, value))
        # (Hq, rows * length, D) -> (rows, Hq, length, D)
        tokens = query[0, :, run.query_start : run.query_start + run.num_rows * run.length]
        queries = tokens.unflatten(1, (run.num_rows, run.length)).transpose(0, 1)
        if run.whole_prompt and visible == CAUSAL and s_aux is None and softcap is None:
            out = _whole_prompt(queries, keys, values, scale)
        else:
            out = _attend(queries, keys, values, step_layout.mask(run, visible), scale, s_aux, softcap)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None], None


def _whole_prompt(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Attend causally, with kernels that need no mask."""
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
    """(B, Hq, Q, D) with (B, Hk, K, D) to (B, Hq, Q, Dv). ``mask``: over (B, 1, Q, K), True where a query may look."""
    if sinks is not None or softcap is not None:
        return _spelled_out(query, key, value, mask, scale, sinks, softcap)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    groups = query.shape[1] // key.shape[1]
    if query.shape[2] == 1:
        # The heads that share a key head become its queries: it is read once for all of them.
        shared = query.unflatten(1, (-1, groups)).squeeze(3)
        return sdpa(shared, key, value, attn_mask=mask, scale=scale).flatten(1, 2).unsqueeze(2)
    if groups > 1 and query.device.type != "cpu":
        # The CUDA kernels that take a mask do not share keys among heads.
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return sdpa(query, key, value, attn_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])


def _spelled_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    sinks: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attend with sinks or a soft cap, which no kernel does: like ``_attend``."""
    batch, num_heads, length, _ = query.shape
    folded = (batch, key.shape[1], -1)  # the queries of all heads that share a key head side by side
    logits = (query.reshape(*folded, query.shape[3]) @ key.transpose(2, 3)).float() * scale
    logits = logits.view(batch, num_heads, length, -1)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        # A sink takes part in the softmax and gives nothing to the sum.
        sink = sinks.float().reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], dim=-1)
    weights = torch.softmax(logits, dim=-1)[..., : key.shape[2]].to(value.dtype)
    return (weights.reshape(*folded, key.shape[2]) @ value).view(batch, num_heads, length, -1)
