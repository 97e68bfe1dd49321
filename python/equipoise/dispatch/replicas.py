"""Chooses replicas without looking at the batch: the nearest (``static``), or in turns by planned weight (``dynamic``).

The turns come from a Weyl sequence (token number times the golden ratio, modulo 1; Knuth's multiplicative hash), which
spreads even a short run of tokens more evenly than random numbers would, needs no generator state and is the same on
every machine.
"""

from __future__ import annotations

import torch

from equipoise.topology import EpTopology

GOLDEN = 0x9E3779B9  # 2**32 / golden ratio, odd: consecutive multiples modulo 2**32 spread evenly
# Odd constants that set ranks, layers and the k choices of a token apart, so that they do not pick in step.
RANK_STRIDE = 0x85EBCA6B
LAYER_STRIDE = 0xC2B2AE35
CHOICE_STRIDE = 0x27D4EB2F
MASK32 = 0xFFFFFFFF


def usable_weights(
    logical_to_physical: torch.Tensor, dispatch_weights: torch.Tensor, live_slots: torch.Tensor
) -> torch.Tensor:
    """The weights of replicas on live ranks, summing to 1 per expert.

    Args:
        logical_to_physical: (L, E, X) int64, padded with -1.
        dispatch_weights: (L, P) float32.
        live_slots: (P,) bool.

    Returns:
        (L, E, X) float32; 0 for padding and for slots of other ranks. Where an expert's weights all lie on those, its
        live replicas share alike; where it has none, all are 0.
    """
    slots = logical_to_physical.clamp(min=0)
    live = (logical_to_physical >= 0) & live_slots[slots]
    weights = dispatch_weights.gather(1, slots.flatten(1)).view_as(slots) * live
    weights = torch.where(weights.sum(-1, keepdim=True) > 0, weights, live.to(weights.dtype))
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def cumulative_weights(weights: torch.Tensor) -> torch.Tensor:
    """(..., X) running sums for :func:`sample_replicas`, 1 from the last replica with a weight on.

    They never fall, and a replica of weight 0 adds nothing, whatever the order in which a device sums up.
    """
    used = weights > 0
    last = used & (used.flip(-1).cumsum(-1).flip(-1) == 1)
    sums = torch.where(used, weights.cumsum(-1), 0.0).cummax(-1).values
    return torch.where(last.cumsum(-1) > 0, 1.0, sums)


def nearest_replicas(
    logical_to_physical: torch.Tensor, topology: EpTopology, rank: int, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """The slot of each expert that is nearest to ``rank``: on it, else on its node, else anywhere.

    Args:
        logical_to_physical: (..., E, X) int64, padded with -1.
        weights: (..., E, X); a replica of weight 0 is never chosen. None: any may be.

    Returns:
        (..., E) int64 slots. Among equally near replicas, ranks take turns by their number.
    """
    slot_rank = logical_to_physical // topology.slots_per_rank
    node = topology.node_of_rank(rank)
    distance = 2 - (slot_rank // topology.ranks_per_node == node).long() - (slot_rank == rank).long()
    usable = (logical_to_physical if weights is None else torch.where(weights > 0, logical_to_physical, -1)) >= 0
    distance = torch.where(usable, distance, 3)
    nearest = distance == distance.amin(-1, keepdim=True)
    turn = rank % nearest.sum(-1, keepdim=True)
    choice = (nearest & (nearest.cumsum(-1) == turn + 1)).long().argmax(-1, keepdim=True)
    return logical_to_physical.gather(-1, choice).squeeze(-1)


def weyl_uniform(
    token_number: torch.Tensor, num_choices: int, *, layer_id: int | torch.Tensor, rank: int | torch.Tensor
) -> torch.Tensor:
    """(T,) int64 token numbers to (T, num_choices) float32 in [0, 1), exact in 24 bits so never 1.

    ``layer_id`` and ``rank`` may be (T, 1) int64, of each token its own.
    """
    offset = (layer_id * LAYER_STRIDE + rank * RANK_STRIDE) & MASK32
    choice = torch.arange(num_choices, device=token_number.device) * CHOICE_STRIDE
    mixed = (token_number[:, None] & MASK32) * GOLDEN + choice + offset
    return ((mixed & MASK32) >> 8).to(torch.float32) * 2.0**-24


def sample_replicas(
    topk_ids: torch.Tensor, uniform: torch.Tensor, logical_to_physical: torch.Tensor, dispatch_cdf: torch.Tensor
) -> torch.Tensor:
    """The replica whose part of [0, 1) each uniform number falls into.

    Args:
        topk_ids: (T, K) int64 logical experts, none negative.
        uniform: (T, K) float32 in [0, 1).
        logical_to_physical: (E, X) int64 of one layer.
        dispatch_cdf: (E, X) float32 of one layer; 1 from an expert's last replica with a weight on.

    Returns:
        (T, K) int64 slots.
    """
    replica = (uniform.unsqueeze(-1) >= dispatch_cdf[topk_ids]).sum(-1)
    return logical_to_physical[topk_ids, replica]
