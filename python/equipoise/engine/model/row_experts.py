"""Experts found by row, registered with transformers as an experts implementation.

``experts(hidden_states, top_k_index, top_k_weights)`` with rows instead of expert numbers in ``top_k_index``, of which
the weights may have far more than one layer uses: the rows of all layers (``ExpertPool``). The work is one matrix
product per row in use; transformers' own grouped product visits every row there is.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

ROW_EXPERTS_NAME = "equipoise_rows"


def register_row_experts() -> None:
    """Makes ``set_experts_implementation(ROW_EXPERTS_NAME)`` known to transformers in this process."""
    ALL_EXPERTS_FUNCTIONS.register(ROW_EXPERTS_NAME, row_experts)


def row_experts(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The forward pass of ``experts``, a module that transformers' ``use_experts_implementation`` has decorated.

    For a CPU: which rows are in use is found out on the host.

    Args:
        hidden_states: (T, H).
        top_k_index: (T, K) int64 rows.
        top_k_weights: (T, K).

    Returns:
        (T, H).
    """
    num_tokens, choices = top_k_index.shape
    rows, order = top_k_index.flatten().sort(stable=True)
    tokens = hidden_states[order // choices]
    results = tokens.new_empty(len(tokens), hidden_states.shape[1])
    in_use, counts = torch.unique_consecutive(rows, return_counts=True)
    start = 0
    for row, count in zip(in_use.tolist(), counts.tolist(), strict=True):
        results[start : start + count] = _expert(experts, row, tokens[start : start + count])
        start += count
    results = results * top_k_weights.flatten()[order, None]
    unsorted = torch.empty_like(results)
    unsorted[order] = results
    return unsorted.view(num_tokens, choices, -1).sum(dim=1).to(hidden_states.dtype)


def _expert(experts: Any, row: int, tokens: torch.Tensor) -> torch.Tensor:
    """(n, H) tokens through the expert in a row."""
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    hidden = _linear(experts, name, row, tokens)
    hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
    return _linear(experts, "down_proj", row, hidden)


def _linear(experts: Any, name: str, row: int, tokens: torch.Tensor) -> torch.Tensor:
    weight = getattr(experts, name)[row]
    bias = getattr(experts, f"{name}_bias")[row] if experts.has_bias else None
    matrix = weight.t() if experts.is_transposed else weight
    return torch.nn.functional.linear(tokens.to(weight.dtype), matrix, bias)
