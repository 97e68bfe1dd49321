"""Scores a placement under the dispatch it will have: what a step sees, which is less than what planned shares promise.

Recorded counts are of all source ranks together; a step's ranks see parts of them, and ``batch`` in scope ``rank`` or
``node`` solves each part alone. :func:`split_over_sources` makes such parts where a trace does not hold them.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from equipoise.dispatch.policy import DispatchPolicy
from equipoise.dispatch.replicas import nearest_replicas, usable_weights
from equipoise.dispatch.solver.assign_numba import solve_counts
from equipoise.dispatch.tables import DispatchTables
from equipoise.errors import LoadError
from equipoise.placement.balancedness import balancedness_of_rank_load
from equipoise.placement.metadata import ExpertLocationMetadata

DispatchKind = Literal["even", "static", "weights", "batch"]
"""``even``: replicas share alike (stock engines); ``static``: each source rank takes the nearest; ``weights``: by
planned weight, exactly; ``batch``: solved on the tokens at hand."""


class StepLoad(NamedTuple):
    """What one step costs the ranks."""

    tokens: np.ndarray  # (L, G) float64, tokens that each rank computes
    activated: np.ndarray  # (L, G) int64, experts whose weights each rank reads

    def balancedness(self) -> np.ndarray:
        """(L,) mean over largest rank load; NaN for a layer without tokens."""
        return balancedness_of_rank_load(self.tokens)

    def cost(self, active_expert_cost: float) -> np.ndarray:
        """(L,) tokens of the busiest rank, each activated expert counted as ``active_expert_cost`` of them."""
        return (self.tokens + active_expert_cost * self.activated).max(-1)


class DispatchScorer:
    """Scores steps on one placement; keep it while the placement stays.

    Args:
        metadata: the placement.
        kind: how an expert's tokens are split over its replicas.
        policy: scope and costs of ``batch``; the default policy if None.
    """

    def __init__(
        self, metadata: ExpertLocationMetadata, kind: DispatchKind = "batch", policy: DispatchPolicy | None = None
    ) -> None:
        self._topology = metadata.topology
        self._kind = kind
        self._policy = policy if policy is not None else DispatchPolicy("batch")
        self._p2l = metadata.physical_to_logical_map.cpu().numpy()
        self._tables: DispatchTables | None = None
        if kind == "batch":
            self._tables = DispatchTables(metadata)
            return
        replicas = metadata.num_replicas.cpu().numpy()
        self._shares = (
            1.0 / np.take_along_axis(replicas, self._p2l, axis=1)
            if kind == "even"
            else metadata.dispatch_weights.cpu().numpy().astype(np.float64)
        )
        if kind == "static":
            self._nearest = _nearest_slots(metadata)

    def step(self, counts: np.ndarray, *, step: int = 0) -> StepLoad:
        """The load of one step.

        Args:
            counts: (G, L, E) integers, tokens by the source rank that routes them.
            step: its number, which decides who rounds in favour of whom.

        Raises:
            LoadError: another shape, or counts that are not whole numbers.
        """
        num_layers, num_slots = self._p2l.shape
        if counts.ndim != 3 or counts.shape[:2] != (self._topology.num_ranks, num_layers):
            raise LoadError(
                f"counts must have shape (source ranks, layers, experts) = ({self._topology.num_ranks}, {num_layers}, "
                f"E), got {counts.shape}",
                field="counts",
            )
        if not np.issubdtype(counts.dtype, np.integer):
            raise LoadError(f"counts must be whole tokens, got dtype {counts.dtype}", field="counts")
        if self._tables is not None:
            return self._batch_step(counts, self._tables, step)
        if self._kind == "static":
            per_slot = np.zeros((num_layers, num_slots))
            layers = np.arange(num_layers)[:, None]
            for rank, nearest in enumerate(self._nearest):
                np.add.at(per_slot, (layers, nearest), counts[rank])
        else:
            per_slot = np.take_along_axis(counts.sum(0), self._p2l, axis=1) * self._shares
        by_rank = per_slot.reshape(num_layers, self._topology.num_ranks, -1)
        return StepLoad(by_rank.sum(-1), (by_rank > 0).sum(-1))

    def _batch_step(self, counts: np.ndarray, tables: DispatchTables, step: int) -> StepLoad:
        topology, policy = self._topology, self._policy
        num_layers, num_slots = self._p2l.shape
        tokens = np.zeros((num_layers, topology.num_ranks), dtype=np.int64)
        read = np.zeros((num_layers, num_slots), dtype=np.uint8)
        size = topology.num_ranks // policy.num_scopes(topology)
        by_scope = counts.reshape(-1, size, *counts.shape[1:]).sum(1).astype(np.int32)
        for scope, scope_counts in enumerate(by_scope):
            controls = policy.controls(topology, scope * size, step=step)
            for layer in range(num_layers):
                solve_counts(layer, scope_counts[layer], tables.host, controls, tokens[layer], read[layer])
        activated = read.reshape(num_layers, topology.num_ranks, -1).sum(-1, dtype=np.int64)
        return StepLoad(tokens.astype(np.float64), activated)


def split_over_sources(counts: np.ndarray, num_ranks: int, rng: np.random.Generator) -> np.ndarray:
    """Splits counts over source ranks at random, each choice alone; totals stay exact.

    Args:
        counts: (L, E) integers.

    Returns:
        (num_ranks, L, E) int64.
    """
    parts = rng.multinomial(np.asarray(counts, dtype=np.int64), np.full(num_ranks, 1.0 / num_ranks))
    return np.moveaxis(parts, -1, 0)


def counts_by_source(
    topk: np.ndarray, num_ranks: int, num_experts: int, *, source: np.ndarray | None = None
) -> np.ndarray:
    """Counts of tokens by the rank that routes them.

    Args:
        topk: (T, L, K) logical experts; -1 for "none".
        source: (T,) rank of each token; None: they are dealt to the ranks in turns.

    Returns:
        (num_ranks, L, E) int64.
    """
    num_tokens, num_layers, _ = topk.shape
    rank = np.arange(num_tokens) % num_ranks if source is None else source
    key = (rank[:, None, None] * num_layers + np.arange(num_layers)[:, None]) * num_experts + topk
    counts = np.bincount(key[topk >= 0], minlength=num_ranks * num_layers * num_experts)
    return counts.reshape(num_ranks, num_layers, num_experts)


def _nearest_slots(metadata: ExpertLocationMetadata) -> list[np.ndarray]:
    """Per source rank, (L, E) slots."""
    import torch

    topology = metadata.topology
    live = torch.ones(topology.num_slots, dtype=torch.bool)
    maps = metadata.logical_to_physical_map.cpu()
    weights = usable_weights(maps, metadata.dispatch_weights.cpu(), live)
    return [nearest_replicas(maps, topology, rank, weights).numpy() for rank in range(topology.num_ranks)]
