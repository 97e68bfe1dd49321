"""Assigns tokens to replicas by their quotas: the reference in torch.

The n-th token of an expert goes to the replica that a running division of the quotas names (Bresenham's, by multiply
and shift): no sort, no random number, quotas met exactly, and consecutive tokens alternate, so that half a batch is
spread like the whole.
"""

from __future__ import annotations

import torch

from equipoise.dispatch.solver.quotas import rounding_phase
from equipoise.dispatch.solver.table_builder import TableArrays

_ALL = (1 << 32) - 1  # this replica takes every token that is left


def quota_inverses(quotas: torch.Tensor) -> torch.Tensor:
    """(M, C) int64: ``ceil(2**32 q_j / N_j)``, N_j the tokens left after the replicas before j.

    With ``c = n inverse >> 32``, replica j takes token n (of N_j, counted from 0) where c rises from n to n + 1, and
    the rest goes on as token n - c. As the inverse is below 2**32 steps are 0 or 1, and at N_j, below 2**31, the count
    is exactly q_j.
    """
    quotas = quotas.long()
    left = quotas.sum(1, keepdim=True) - quotas.cumsum(1) + quotas
    inverse = ((quotas << 32) + left - 1) // left.clamp(min=1)
    return torch.where((quotas > 0) & (quotas == left), _ALL, torch.where(left > 0, inverse, 0))


def assign_slots(
    ids: torch.Tensor,
    quotas: torch.Tensor,
    tables: TableArrays[torch.Tensor],
    rotation: int,
    before: torch.Tensor | None = None,
) -> torch.Tensor:
    """Slots for logical experts.

    Args:
        ids: any shape and integer dtype; outside [0, E) for "none".
        quotas: (M, C), of the scope's tokens.
        tables: of one layer.
        before: (E,) tokens of each expert on the scope's ranks before this one; 0 if None.

    Returns:
        Slots in the shape and dtype of ``ids``; -1 for "none".
    """
    row_of_expert = tables.row_of_expert.long()
    flat, num_experts = ids.reshape(-1).long(), len(row_of_expert)
    valid = (flat >= 0) & (flat < num_experts)
    expert = flat.clamp(0, num_experts - 1)
    is_expert = (expert[:, None] == torch.arange(num_experts)) & valid[:, None]
    nth = (is_expert.cumsum(0) - 1).gather(1, expert[:, None])[:, 0]
    if before is not None:
        nth = nth + before.long()[expert]
    single, row = row_of_expert[expert] < 0, row_of_expert[expert].clamp(min=0)
    tokens = quotas.sum(1).long()
    nth = nth + ((tokens * rounding_phase(len(quotas), rotation)) >> 16)[row]
    nth = torch.where(nth >= tokens[row], nth - tokens[row], nth)
    slots, done = tables.slot_of_expert.long()[expert], single
    inverses = quota_inverses(quotas)
    for j in range(quotas.shape[1]):
        inverse = inverses[row, j]
        taken = (nth * inverse) >> 32
        hit = ~done & ((((nth + 1) * inverse) >> 32 > taken) | (inverse == _ALL))
        slots = torch.where(hit, tables.slot.long()[row, j], slots)
        done = done | hit
        nth = torch.where(done, nth, nth - taken)
    return torch.where(valid, slots, -1).to(ids.dtype).reshape(ids.shape)
