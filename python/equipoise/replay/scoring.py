"""What one step costs the ranks of a placement, under the dispatch that it will have."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from equipoise.dispatch.policy import DispatchPolicy
from equipoise.dispatch.replicas import sample_replicas, weyl_uniform
from equipoise.dispatch.score import DispatchScorer, StepLoad
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.replay.sources import SourceSplit, ranks_of_tokens

Dispatch = Literal["even", "static", "weights", "batch"]
"""``even``: each token takes a replica at random, as stock engines do; ``static``: each source rank takes the nearest;
``weights``: in turns by the plan's shares (the engine's ``dynamic``); ``batch``: solved on the tokens at hand."""


class BatchScorer:
    """Scores steps under a kind of dispatch that looks at each source rank's own tokens.

    Args:
        policy: scope and costs of ``batch``.
    """

    def __init__(
        self, metadata: ExpertLocationMetadata, dispatch: Dispatch, sources: SourceSplit, policy: DispatchPolicy
    ) -> None:
        self._scorer = DispatchScorer(metadata, dispatch, policy)
        self._sources = sources

    def step(self, counts: np.ndarray, index: int) -> StepLoad:  # noqa: ARG002 the sum is not enough
        """The load of step ``index``."""
        return self._scorer.step(self._sources.step(index), step=index)


def make_scorer(
    metadata: ExpertLocationMetadata, dispatch: Dispatch, sources: SourceSplit, policy: DispatchPolicy
) -> StepScorer | TurnScorer | BatchScorer:
    """Scores steps on one placement; the placement is read now."""
    if dispatch in ("static", "batch"):
        return BatchScorer(metadata, dispatch, sources, policy)
    if dispatch == "weights":
        return TurnScorer(metadata, sources)
    return StepScorer(metadata, dispatch)


class TurnScorer:
    """Scores steps as dispatch by planned weight plays them: replicas take turns, token by token.

    Steps of very many tokens are scored by :class:`StepScorer`: there the turns are as the shares say.
    """

    def __init__(self, metadata: ExpertLocationMetadata, sources: SourceSplit) -> None:
        topology = metadata.topology
        # The map has room for every slot of an expert; of that, what is in use.
        maps = metadata.logical_to_physical_map[:, :, : int(metadata.num_replicas.max())]
        self._topology = topology
        self._shape = metadata.physical_to_logical_map.shape
        self._maps = maps.flatten(0, 1)  # (L * E, X)
        self._cdf = metadata.dispatch_cdf[:, :, : maps.shape[2]].flatten(0, 1)
        self._sources = sources
        self._whole = StepScorer(metadata, "weights")

    def step(self, counts: np.ndarray, index: int) -> StepLoad:
        """The load of step ``index``, and how many experts it activates."""
        tokens = self._sources.tokens(index)
        if tokens is None:
            return self._whole.step(counts, index)
        (num_layers, num_tokens, top_k), (_, num_slots) = tokens.shape, self._shape
        num_ranks, num_experts = self._topology.num_ranks, counts.shape[1]
        # Each rank counts its tokens on from step to step.
        ranks = ranks_of_tokens(num_tokens, num_ranks)
        rank = torch.from_numpy(ranks)
        number = torch.arange(num_tokens) - torch.from_numpy(np.searchsorted(ranks, ranks))
        number = number + index * -(-num_tokens // num_ranks)
        layer = torch.arange(num_layers).repeat_interleave(num_tokens)[:, None]
        uniform = weyl_uniform(
            number.repeat(num_layers), top_k, layer_id=layer, rank=rank.repeat(num_layers)[:, None]
        )  # fmt: skip
        ids = torch.from_numpy(tokens).view(-1, top_k)
        slots = sample_replicas(ids.clamp(min=0) + layer * num_experts, uniform, self._maps, self._cdf)
        cells = (slots + layer * num_slots)[ids >= 0]
        per_slot = np.bincount(cells.numpy(), minlength=num_layers * num_slots).astype(np.float64)
        by_rank = per_slot.reshape(num_layers, num_ranks, -1)
        return StepLoad(by_rank.sum(-1), (by_rank > 0).sum(-1))


class StepScorer:
    """Scores steps under a kind of dispatch that splits by fixed shares.

    Whole tokens are drawn by these shares, as engines let replicas take turns: a handful of tokens never falls as its
    shares say. The draws of a step are the same each time.
    """

    def __init__(self, metadata: ExpertLocationMetadata, dispatch: Dispatch) -> None:
        self._topology = metadata.topology
        self._p2l = metadata.physical_to_logical_map.numpy()
        maps, replicas = metadata.logical_to_physical_map.numpy(), metadata.num_replicas.numpy()
        self._layers, self._experts = np.nonzero(replicas > 1)
        slots = maps[self._layers, self._experts][:, : int(replicas.max(initial=1))]  # (M, X), padded with -1
        held = slots >= 0
        if dispatch == "even":
            shares = held.astype(np.float64)
        else:
            weights = metadata.dispatch_weights.numpy().astype(np.float64)
            shares = np.where(held, weights[self._layers[:, None], slots], 0.0)
        self._shares = shares / shares.sum(1, keepdims=True)
        self._row, self._column = np.nonzero(held)
        self._slot_layers, self._slots = self._layers[self._row], slots[held]

    def step(self, counts: np.ndarray, index: int = 0) -> StepLoad:
        """The load of step ``index``, and how many experts it activates.

        Args:
            counts: (L, E) tokens per logical expert.
        """
        num_layers, num_slots = self._p2l.shape
        per_slot = np.take_along_axis(counts, self._p2l, axis=1).astype(np.float64)
        if len(self._layers):
            whole = np.rint(counts[self._layers, self._experts]).astype(np.int64)
            drawn = np.random.default_rng(index).multinomial(whole, self._shares)
            per_slot[self._slot_layers, self._slots] = drawn[self._row, self._column]
        by_rank = per_slot.reshape(num_layers, self._topology.num_ranks, num_slots // self._topology.num_ranks)
        return StepLoad(by_rank.sum(-1), (by_rank > 0).sum(-1))


def force_balanced(counts: np.ndarray, num_ranks: int, num_slots: int) -> StepLoad:
    """What no placement can beat: every rank has the mean load and the mean number of activated experts."""
    tokens = counts.sum(-1, dtype=np.float64) / num_ranks
    activated = np.minimum((counts > 0).sum(-1), num_slots) / num_ranks
    return StepLoad(np.tile(tokens[:, None], num_ranks), np.tile(activated[:, None], num_ranks))
