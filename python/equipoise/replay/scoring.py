"""What one step costs the ranks of a placement, under the dispatch that it will have."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from equipoise.placement.balancedness import balancedness_of_rank_load
from equipoise.placement.metadata import ExpertLocationMetadata

Dispatch = Literal["even", "weights"]
"""``even``: replicas share an expert's tokens alike, as stock engines do; ``weights``: by the plan's shares."""


class StepLoad(NamedTuple):
    """Loads of the ranks in one step."""

    tokens: np.ndarray  # (L, G) float64, token-expert pairs that a rank computes
    activated: np.ndarray  # (L, G) float64, experts whose weights it is expected to read

    def balancedness(self) -> np.ndarray:
        """(L,) mean over largest rank load; NaN for a layer without tokens."""
        return balancedness_of_rank_load(self.tokens)


class StepScorer:
    """Scores steps on one placement; the placement is read when the scorer is made."""

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

    def step(self, counts: np.ndarray) -> StepLoad:
        """The load of one step.

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
