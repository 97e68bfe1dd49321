"""From logical experts to the slots that serve them: the choice among replicas, for the top-k ids of a batch.

Two ways, named as SGLang names them. ``static``: each rank always takes the nearest replica (same rank, else same
node, else anywhere; ties spread over ranks). ``dynamic``: replicas take turns in the proportion of their dispatch
weights. The turns come from a Weyl sequence (token number times the golden ratio, modulo 1; Knuth's multiplicative
hash), which spreads even a short run of tokens more evenly than random numbers would, needs no generator state and
is the same on every machine.

Everything here stays on the device of the maps: no host sync, and nothing allocated that outlives a step.
"""

from __future__ import annotations

import torch

from equipoise.config import DispatchAlgorithm
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology

_GOLDEN = 0x9E3779B9  # 2**32 / golden ratio, odd: consecutive multiples modulo 2**32 spread evenly
# Odd constants that set ranks, layers and the k choices of a token apart, so that they do not pick in step.
_RANK_STRIDE = 0x85EBCA6B
_LAYER_STRIDE = 0xC2B2AE35
_CHOICE_STRIDE = 0x27D4EB2F
_MASK32 = 0xFFFFFFFF


def nearest_replicas(logical_to_physical: torch.Tensor, topology: EpTopology, rank: int) -> torch.Tensor:
    """The slot of each expert that is nearest to ``rank``.

    Args:
        logical_to_physical: (..., E, X) int64, padded with -1.

    Returns:
        (..., E) int64 slots. Among equally near replicas, ranks take turns by their number.
    """
    slot_rank = logical_to_physical // topology.slots_per_rank
    node = topology.node_of_rank(rank)
    distance = 2 - (slot_rank // topology.ranks_per_node == node).long() - (slot_rank == rank).long()
    distance = torch.where(logical_to_physical < 0, 3, distance)
    nearest = distance == distance.amin(-1, keepdim=True)
    turn = rank % nearest.sum(-1, keepdim=True)
    choice = (nearest & (nearest.cumsum(-1) == turn + 1)).long().argmax(-1, keepdim=True)
    return logical_to_physical.gather(-1, choice).squeeze(-1)


def weyl_uniform(token_number: torch.Tensor, num_choices: int, *, layer_id: int, rank: int) -> torch.Tensor:
    """(T,) int64 token numbers to (T, num_choices) float32 in [0, 1), exact in 24 bits so never 1."""
    offset = (layer_id * _LAYER_STRIDE + rank * _RANK_STRIDE) & _MASK32
    choice = torch.arange(num_choices, device=token_number.device) * _CHOICE_STRIDE
    mixed = (token_number[:, None] & _MASK32) * _GOLDEN + choice + offset
    return ((mixed & _MASK32) >> 8).to(torch.float32) * 2.0**-24


def sample_replicas(
    topk_ids: torch.Tensor, uniform: torch.Tensor, logical_to_physical: torch.Tensor, dispatch_cdf: torch.Tensor
) -> torch.Tensor:
    """The replica whose share of [0, 1) each uniform number falls into.

    Args:
        topk_ids: (T, K) int64 logical experts, none negative.
        uniform: (T, K) float32 in [0, 1).
        logical_to_physical: (E, X) int64 of one layer.
        dispatch_cdf: (E, X) float32 of one layer; 1 from an expert's last replica on, so padding is never chosen.

    Returns:
        (T, K) int64 slots.
    """
    replica = (uniform.unsqueeze(-1) >= dispatch_cdf[topk_ids]).sum(-1)
    return logical_to_physical[topk_ids, replica]


class ExpertDispatcher:
    """Dispatch for one rank over the live maps; sees a layer's new map as soon as it was updated in place."""

    def __init__(self, metadata: ExpertLocationMetadata, *, rank: int, algorithm: DispatchAlgorithm) -> None:
        self._metadata = metadata
        self._rank = rank
        self._algorithm = algorithm
        device = metadata.physical_to_logical_map.device
        # Advances on the device, so that a captured CUDA graph does not freeze it.
        self._next_token = torch.zeros((), dtype=torch.int64, device=device)
        self._nearest = (
            nearest_replicas(metadata.logical_to_physical_map, metadata.topology, rank)
            if algorithm == "static"
            else None
        )

    def dispatch(self, layer_id: int, topk_ids: torch.Tensor) -> torch.Tensor:
        """Slots for the chosen experts of a batch.

        Args:
            layer_id: MoE layer, 0-based.
            topk_ids: (T, K) int64 logical experts; -1 for "none".

        Returns:
            (T, K) int64 slots; -1 stays -1.
        """
        experts = topk_ids.clamp(min=0)
        if self._nearest is not None:
            slots = self._nearest[layer_id][experts]
        else:
            num_tokens, num_choices = topk_ids.shape
            number = self._next_token + torch.arange(num_tokens, device=topk_ids.device)
            uniform = weyl_uniform(number, num_choices, layer_id=layer_id, rank=self._rank)
            slots = sample_replicas(
                experts,
                uniform,
                self._metadata.logical_to_physical_map[layer_id],
                self._metadata.dispatch_cdf[layer_id],
            )
        return torch.where(topk_ids < 0, topk_ids, slots)

    def advance(self, num_tokens: int) -> None:
        """Ends a step: the next one continues the turns ``num_tokens`` further."""
        self._next_token += num_tokens

    def refresh(self, layer_ids: list[int]) -> None:
        """Takes note that the live maps of these layers changed (in place, as the maps do)."""
        if layer_ids and self._nearest is not None:
            index = torch.tensor(layer_ids, device=self._nearest.device)
            maps = self._metadata.logical_to_physical_map[index]
            self._nearest[index] = nearest_replicas(maps, self._metadata.topology, self._rank)
