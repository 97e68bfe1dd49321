"""Random placements and weights for tests of the transfer path, and the one-process oracle they are compared with."""

from __future__ import annotations

import numpy as np
import torch

from equipoise.topology import EpTopology
from equipoise.transfer.memory.pool import ExpertPool

WEIGHT_SPECS: tuple[tuple[torch.dtype, tuple[int, ...]], ...] = (
    (torch.float32, (3, 5)),
    (torch.bfloat16, (7,)),
    (torch.uint8, (4, 2)),
    (torch.float8_e4m3fn, (6,)),
    (torch.int64, ()),
)


def random_map(rng: np.random.Generator, num_experts: int, topology: EpTopology, num_layers: int = 1) -> np.ndarray:
    """(L, P) with every expert at least once; redundant slots are skewed, so some experts have many replicas."""
    rows = []
    for _ in range(num_layers):
        extra = topology.num_slots - num_experts
        favoured = rng.permutation(num_experts)[: max(1, int(rng.integers(1, num_experts + 1)))]
        row = np.concatenate([np.arange(num_experts), rng.choice(favoured, extra)])
        rng.shuffle(row)
        rows.append(row)
    return np.stack(rows)


def perturbed(rng: np.random.Generator, old: np.ndarray, num_experts: int) -> np.ndarray:
    """``old`` with a few slots swapped and a few replicas replaced: what a rebalance under small drift looks like."""
    new = old.copy()
    for row in new:
        for _ in range(int(rng.integers(0, 4))):
            a, b = rng.integers(0, row.size, 2)
            row[a], row[b] = row[b], row[a]
        for _ in range(int(rng.integers(0, 3))):
            counts = np.bincount(row, minlength=num_experts)
            replaceable = np.flatnonzero(counts[row] > 1)
            if replaceable.size:
                row[rng.choice(replaceable)] = rng.integers(0, num_experts)
    return new


def random_topology(rng: np.random.Generator, num_ranks: int) -> EpTopology:
    nodes = [n for n in range(1, num_ranks + 1) if num_ranks % n == 0]
    return EpTopology(num_ranks, int(rng.choice(nodes)), int(rng.integers(1, 6)))


def expert_row(layer: int, expert: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The oracle: what any slot that holds ``expert`` must contain, byte for byte."""
    generator = torch.Generator().manual_seed(1_000_003 * layer + 7919 * expert + 13 * len(shape) + 1)
    num_bytes = torch.empty(shape, dtype=dtype).numel() * torch.empty((), dtype=dtype).element_size()
    data = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(shape)


def rank_weights(
    p2l: np.ndarray,
    rank: int,
    topology: EpTopology,
    specs: tuple[tuple[torch.dtype, tuple[int, ...]], ...] = WEIGHT_SPECS,
) -> list[list[torch.Tensor]]:
    """``[layer][tensor]`` of one rank for an (L, P) map."""
    slots = topology.slots_of_rank(rank)
    return [
        [
            torch.stack([expert_row(layer, int(e), dtype, shape) for e in row[slots.start : slots.stop]])
            for dtype, shape in specs
        ]
        for layer, row in enumerate(p2l)
    ]


def pooled(weights: list[list[torch.Tensor]], num_spare: int) -> ExpertPool:
    """The same experts in rows that all layers share; the spare ones hold garbage."""
    slots = weights[0][0].shape[0]
    tensors = []
    for of_all_layers in zip(*weights, strict=True):
        rows = torch.cat([_rows_as_bytes(tensor) for tensor in of_all_layers])
        garbage = torch.full((num_spare, rows.shape[1]), 0xA5, dtype=torch.uint8)
        dtype, shape = of_all_layers[0].dtype, of_all_layers[0].shape[1:]
        tensors.append(torch.cat([rows, garbage]).view(dtype).reshape(len(rows) + num_spare, *shape))
    return ExpertPool(tensors, len(weights), slots)


def live_weights(weights: list[list[torch.Tensor]] | ExpertPool) -> list[list[torch.Tensor]]:
    """``[layer][tensor]`` as a forward pass would find them."""
    if not isinstance(weights, ExpertPool):
        return weights
    return [
        [_rows_as_bytes(tensor)[rows].view(tensor.dtype).reshape(-1, *tensor.shape[1:]) for tensor in weights.tensors]
        for rows in weights.row_of_slot
    ]


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def _rows_as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return _bytes(tensor).reshape(tensor.shape[0], -1)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
