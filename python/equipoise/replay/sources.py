"""The tokens of a step by the rank that routes them, as far as a trace knows."""

from __future__ import annotations

import numpy as np

from equipoise.dispatch.score import counts_by_source, split_over_sources
from equipoise.load.trace import LoadTrace

_MOST_DEALT = 1 << 17  # choices of a step; of more, what falls otherwise than its share is nothing


def top_k_of(trace: LoadTrace, default: int) -> int:
    """Experts that a token chooses, as far as the trace knows."""
    top_k = trace.metadata.get("top_k")
    return top_k if isinstance(top_k, int) and top_k > 0 else default


def ranks_of_tokens(num_tokens: int, num_ranks: int) -> np.ndarray:
    """(num_tokens,) int64, ascending: the rank that holds each token, as even as it goes."""
    return np.arange(num_tokens) * num_ranks // max(num_tokens, 1)


class SourceSplit:
    """Counts of a step by the rank that routes them.

    Recorded apart for as many ranks, they are taken; recorded tokens are dealt to the ranks; sums are dealt to
    tokens at random, the same way each time.
    """

    def __init__(self, trace: LoadTrace, num_ranks: int, top_k: int = 8) -> None:
        self._trace = trace
        self._num_ranks = num_ranks
        self._top_k = top_k_of(trace, top_k)

    def step(self, index: int) -> np.ndarray:
        """(G, L, E) int64."""
        trace, ranks = self._trace, self._num_ranks
        if trace.rank_count is not None and trace.rank_count.shape[1] == ranks:
            return np.asarray(trace.rank_count[index], dtype=np.int64)
        recorded = self._recorded(index)
        if recorded is not None:
            return counts_by_source(recorded, ranks, trace.num_logical_experts)
        tokens = self.tokens(index)
        if tokens is None:
            counts = np.rint(trace.logical_count[index]).astype(np.int64)
            return split_over_sources(counts, ranks, np.random.default_rng(index))
        source = ranks_of_tokens(tokens.shape[1], ranks)
        return counts_by_source(tokens.transpose(1, 0, 2), ranks, trace.num_logical_experts, source=source)

    def tokens(self, index: int) -> np.ndarray | None:
        """(L, T, K) int64 experts of each token, -1 for none; None for more tokens than are worth looking at singly."""
        recorded = self._recorded(index)
        if recorded is not None:
            return np.ascontiguousarray(recorded.transpose(1, 0, 2)) if recorded.size <= _MOST_DEALT else None
        counts = np.rint(self._trace.logical_count[index]).astype(np.int64)
        if counts.sum() > _MOST_DEALT:
            return None
        return _deal(counts, self._top_k, np.random.default_rng(index))

    def _recorded(self, index: int) -> np.ndarray | None:
        """(T, L, K) int64 experts of a step's recorded tokens; None where the trace holds sums alone."""
        ids, offsets = self._trace.topk_ids, self._trace.token_offsets
        return None if ids is None or offsets is None else ids[offsets[index] : offsets[index + 1]].astype(np.int64)


def _deal(counts: np.ndarray, top_k: int, rng: np.random.Generator) -> np.ndarray:
    """(L, T, K) tokens with (L, E) counts.

    Choices are dealt expert by expert to one token after the other, in an order that is new each time round: an
    expert's choices go to different tokens, as a router's do.
    """
    num_layers, num_experts = counts.shape
    totals = counts.sum(1)
    num_tokens = -(-int(totals.max(initial=0)) // top_k)
    tokens = np.full((num_layers, num_tokens, top_k), -1)
    if num_tokens:
        experts = rng.permuted(np.tile(np.arange(num_experts), (num_layers, 1)), axis=1)
        seats = rng.permuted(np.tile(np.arange(num_tokens), (num_layers, top_k, 1)), axis=2)
        chosen = np.repeat(experts.ravel(), np.take_along_axis(counts, experts, axis=1).ravel())
        layer = np.repeat(np.arange(num_layers), totals)
        round_, place = np.divmod(np.arange(len(chosen)) - (totals.cumsum() - totals)[layer], num_tokens)
        tokens[layer, seats[layer, round_, place], round_] = chosen
    return tokens
