"""What one step costs the ranks of a placement, under the dispatch that it will have."""

from __future__ import annotations

from typing import Literal

import numpy as np

from equipoise.dispatch.policy import DispatchPolicy
from equipoise.dispatch.score import DispatchScorer, StepLoad, counts_by_source, split_over_sources
from equipoise.load.trace import LoadTrace
from equipoise.placement.metadata import ExpertLocationMetadata

Dispatch = Literal["even", "static", "weights", "batch"]
"""``even``: replicas share an expert's tokens alike, as stock engines do; ``static``: each source rank takes the
nearest; ``weights``: by the plan's shares; ``batch``: solved on the tokens at hand of each source rank."""


class SourceSplit:
    """Counts of a step by the rank that routes them, as far as a trace knows.

    Recorded apart for as many ranks, they are taken; recorded tokens are dealt to the ranks in turns; sums are split at
    random, the same way each time.
    """

    def __init__(self, trace: LoadTrace, num_ranks: int) -> None:
        self._trace = trace
        self._num_ranks = num_ranks

    def step(self, index: int) -> np.ndarray:
        """(G, L, E) int64."""
        trace, ranks = self._trace, self._num_ranks
        if trace.rank_count is not None and trace.rank_count.shape[1] == ranks:
            return np.asarray(trace.rank_count[index], dtype=np.int64)
        if trace.topk_ids is not None and trace.token_offsets is not None:
            part = trace.topk_ids[trace.token_offsets[index] : trace.token_offsets[index + 1]]
            return counts_by_source(part.astype(np.int64), ranks, trace.num_logical_experts)
        counts = np.rint(trace.logical_count[index]).astype(np.int64)
        return split_over_sources(counts, ranks, np.random.default_rng(index))


class BatchScorer:
    """Scores steps under a kind of dispatch that looks at each source rank's own tokens.

    Args:
        active_expert_cost: tokens that reading one more expert is worth, for ``batch``.
    """

    def __init__(
        self, metadata: ExpertLocationMetadata, dispatch: Dispatch, sources: SourceSplit, active_expert_cost: float
    ) -> None:
        policy = DispatchPolicy("batch", active_expert_cost=active_expert_cost)
        self._scorer = DispatchScorer(metadata, dispatch, policy)
        self._sources = sources

    def step(self, counts: np.ndarray, index: int) -> StepLoad:  # noqa: ARG002 the sum is not enough
        """The load of step ``index``."""
        return self._scorer.step(self._sources.step(index), step=index)


def make_scorer(
    metadata: ExpertLocationMetadata, dispatch: Dispatch, sources: SourceSplit, active_expert_cost: float
) -> StepScorer | BatchScorer:
    """Scores steps on one placement; the placement is read now."""
    if dispatch in ("static", "batch"):
        return BatchScorer(metadata, dispatch, sources, active_expert_cost)
    return StepScorer(metadata, dispatch)


class StepScorer:
    """Scores steps under a kind of dispatch that splits by fixed shares."""

    def __init__(self, metadata: ExpertLocationMetadata, dispatch: Dispatch) -> None:
        self._topology = metadata.topology
        self._p2l = metadata.physical_to_logical_map.numpy()
        if dispatch == "even":
            replicas = np.take_along_axis(metadata.num_replicas.numpy(), self._p2l, axis=1)
            self._shares = 1.0 / replicas
        else:
            self._shares = metadata.dispatch_weights.numpy().astype(np.float64)
        # log(1 - share), so that the chance of a slot without any of n tokens is exp(n * it); a sole replica has none.
        self._log_rest = np.log1p(-np.minimum(self._shares, 1 - 1e-12))

    def step(self, counts: np.ndarray, index: int = 0) -> StepLoad:  # noqa: ARG002 shares are the same in every step
        """The expected load of a step, and how many experts it is expected to activate.

        Args:
            counts: (L, E) tokens per logical expert.
        """
        num_layers, num_slots = self._p2l.shape
        per_slot = np.take_along_axis(counts, self._p2l, axis=1).astype(np.float64)
        read = -np.expm1(per_slot * self._log_rest)
        shape = (num_layers, self._topology.num_ranks, num_slots // self._topology.num_ranks)
        return StepLoad((per_slot * self._shares).reshape(shape).sum(-1), read.reshape(shape).sum(-1))


def force_balanced(counts: np.ndarray, num_ranks: int, num_slots: int) -> StepLoad:
    """What no placement can beat: every rank has the mean load and the mean number of activated experts."""
    tokens = counts.sum(-1, dtype=np.float64) / num_ranks
    activated = np.minimum((counts > 0).sum(-1), num_slots) / num_ranks
    return StepLoad(np.tile(tokens[:, None], num_ranks), np.tile(activated[:, None], num_ranks))
