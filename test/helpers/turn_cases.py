"""Random placements and batches for the tests of ``static`` and ``dynamic``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from equipoise import EpTopology, ExpertLocationMetadata


@dataclass(frozen=True)
class TurnStep:
    """One batch; ``ids`` (T, K) holds -1 and what is no expert, all ranks' tokens where there are ``bounds``."""

    ids: torch.Tensor
    bounds: list[int] | None
    num_unpadded: torch.Tensor | None
    advance: int
    moves: list[int]  # layers that take over another placement before the next batch


@dataclass(frozen=True)
class TurnCase:
    """Batches of one rank over two placements of one shape."""

    metadata: ExpertLocationMetadata
    target: ExpertLocationMetadata
    nearest: bool
    rank: int
    live_ranks: list[int] | None
    layer: int
    steps: list[TurnStep]


def placement(topology: EpTopology, num_experts: int, rng: np.random.Generator, room: int) -> ExpertLocationMetadata:
    """Two layers; experts of many replicas, some of weight 0, and each on live ranks (all but the last) at least."""
    rows, weights = [], []
    safe = topology.num_slots - topology.slots_per_rank if topology.num_ranks > 1 else topology.num_slots
    for _ in range(2):
        favourite = rng.integers(0, num_experts, topology.num_slots - num_experts)
        favourite[rng.random(len(favourite)) < 0.6] = rng.integers(num_experts)
        first = rng.permutation(np.concatenate([np.arange(num_experts), favourite[: safe - num_experts]]))
        row = np.concatenate([first, favourite[safe - num_experts :]])
        share = rng.random(len(row)) * (rng.random(len(row)) < 0.7)
        share[np.bincount(row, share, minlength=num_experts)[row] == 0] = 1.0
        rows.append(row)
        weights.append(share / np.bincount(row, share, minlength=num_experts)[row])
    return ExpertLocationMetadata.from_physical_to_logical(
        np.stack(rows), num_experts, topology, dispatch_weights=np.stack(weights), max_replicas=room
    )


@st.composite
def turn_cases(draw: st.DrawFn, *, max_tokens: int) -> TurnCase:
    """Both rules, both integer types, top-k 1 to 16, empty batches, padding, bounds, a lost rank, moved layers."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_nodes = draw(st.integers(1, 2))
    topology = EpTopology(num_nodes * draw(st.integers(1, 4)), num_nodes, draw(st.integers(1, 6)))
    safe = topology.num_slots - topology.slots_per_rank if topology.num_ranks > 1 else topology.num_slots
    num_experts = draw(st.integers(1, safe))
    room = topology.num_slots - num_experts + 1
    rank = draw(st.integers(0, topology.num_ranks - 1))
    a_rank_is_lost = topology.num_ranks > 1 and draw(st.booleans())
    dtype, width = draw(st.sampled_from([torch.int32, torch.int64])), draw(st.sampled_from([1, 2, 3, 8, 16]))
    steps = []
    for _ in range(draw(st.integers(1, 3))):
        by_rank = rng.integers(0, max_tokens // topology.num_ranks + 2, topology.num_ranks)
        bounds = [0, *by_rank.cumsum().tolist()] if draw(st.booleans()) else None
        tokens = draw(st.sampled_from([0, 1, 7, max_tokens])) if bounds is None else bounds[-1]
        unpadded = draw(st.none() | st.integers(0, tokens + 2))
        unpadded_type = draw(st.sampled_from([torch.int32, torch.int64]))
        steps.append(
            TurnStep(
                torch.from_numpy(rng.integers(-1, num_experts + 1, (tokens, width))).to(dtype),
                bounds,
                None if unpadded is None else torch.tensor([unpadded], dtype=unpadded_type),
                draw(st.sampled_from([0, 1, tokens, 2**31 + tokens, 2**40])),
                draw(st.sampled_from([[], [0], [1], [0, 1]])),
            )
        )
    return TurnCase(
        placement(topology, num_experts, rng, room),
        placement(topology, num_experts, rng, room),
        draw(st.booleans()),
        rank,
        list(range(topology.num_ranks - 1)) if a_rank_is_lost else None,
        draw(st.integers(0, 1)),
        steps,
    )
