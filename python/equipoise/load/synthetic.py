"""Synthetic load: skewed expert popularity that drifts slowly and shifts suddenly, from a seed.

Each expert of each layer has a standard normal score that follows an Ornstein-Uhlenbeck process (drift) and is drawn
anew at a shift. A monotone map of the scores gives popularities with the same distribution at every step, so the skew
stays while the experts that carry it change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import gammaincinv, ndtr

from equipoise.errors import ConfigError
from equipoise.load.trace import LoadTrace


@dataclass(frozen=True)
class SyntheticLoad:
    """What a synthetic workload looks like.

    ``popularity`` is the shape of the skew: ``zipf`` gives the expert of rank r a weight of ``1 / r ** skew``;
    ``dirichlet`` draws weights from a symmetric Dirichlet of concentration ``1 / skew``. A larger skew is less even.

    Raises:
        ConfigError: a number out of its range.
    """

    num_steps: int
    num_layers: int = 58
    num_logical_experts: int = 256
    tokens_per_step: int = 4096
    top_k: int = 8
    popularity: Literal["zipf", "dirichlet"] = "zipf"
    skew: float = 0.6
    drift_steps: float = math.inf  # steps after which popularity has forgotten 63% of what it was
    shift_at: Sequence[int] = ()  # steps at which the popularity is drawn anew
    shifted_fraction: float = 1.0  # part of a layer's experts that a shift redraws
    alternate_every: int | None = None  # steps after which one of two workloads takes over from the other
    burst_every: int | None = None  # steps between bursts, in which few experts take a third of all tokens
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_layers", "num_logical_experts", "tokens_per_step", "top_k"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}", field=name)
        for name in ("alternate_every", "burst_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}", field=name)
        if self.top_k > self.num_logical_experts:
            raise ConfigError(
                f"top_k must be at most num_logical_experts={self.num_logical_experts}, got {self.top_k}", field="top_k"
            )
        if self.popularity not in ("zipf", "dirichlet"):
            raise ConfigError(f"popularity must be zipf or dirichlet, got {self.popularity!r}", field="popularity")
        for name, good, must in (
            ("skew", 0 < self.skew < math.inf, "a positive number"),
            ("drift_steps", self.drift_steps > 0, "above 0"),
            ("shifted_fraction", 0 <= self.shifted_fraction <= 1, "in [0, 1]"),
        ):
            if not good:
                raise ConfigError(f"{name} must be {must}, got {getattr(self, name)}", field=name)


def synthetic_trace(load: SyntheticLoad) -> LoadTrace:
    """Draws a trace; the same ``load`` gives the same counts.

    Each step and layer holds exactly ``tokens_per_step * top_k`` assignments. An expert is expected on at most every
    token, as a router picks ``top_k`` different ones.
    """
    rng = np.random.default_rng(load.seed)
    shape = (load.num_layers, load.num_logical_experts)
    keep = math.exp(-1.0 / load.drift_steps)
    shifts = frozenset(load.shift_at)
    score = rng.standard_normal(shape)
    other = rng.standard_normal(shape) if load.alternate_every is not None else score
    counts = np.empty((load.num_steps, *shape), dtype=np.int64)
    for step in range(load.num_steps):
        if step in shifts:
            score = np.where(rng.random(shape) < load.shifted_fraction, rng.standard_normal(shape), score)
        elif keep < 1:
            score = keep * score + math.sqrt(1 - keep * keep) * rng.standard_normal(shape)
        of_step = other if load.alternate_every is not None and step // load.alternate_every % 2 else score
        share = _weights(of_step, load)
        if load.burst_every is not None and step % load.burst_every == load.burst_every - 1:
            share = _burst(share, rng)
        share = _capped(share, load.top_k)
        counts[step] = rng.multinomial(load.tokens_per_step * load.top_k, share)
    return LoadTrace(
        counts,
        metadata={"source": "synthetic", "seed": load.seed, "shift_at": sorted(shifts), "top_k": load.top_k},
        found="synthetic load",
    )


def _burst(share: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A third of the load on a sixteenth of the experts of each layer, drawn anew for each burst."""
    num_layers, num_experts = share.shape
    hot = rng.permuted(np.tile(np.arange(num_experts) < max(1, num_experts // 16), (num_layers, 1)), axis=1)
    return share * (2 / 3) + hot / hot.sum(1, keepdims=True) / 3


def _weights(score: np.ndarray, load: SyntheticLoad) -> np.ndarray:
    """Popularity (L, E), rows summing to 1, from standard normal scores."""
    quantile = ndtr(score)
    if load.popularity == "zipf":
        # A smooth rank: experts trade places without a jump.
        weights = ((1.0 - quantile) * load.num_logical_experts + 0.5) ** -load.skew
    else:
        weights = gammaincinv(1.0 / load.skew, np.clip(quantile, 1e-12, 1 - 1e-12)) + 1e-12
    return weights / weights.sum(-1, keepdims=True)


def _capped(share: np.ndarray, top_k: int) -> np.ndarray:
    """Shares (L, E) of all assignments with none above 1 / top_k; the rest is scaled up to make 1 again."""
    limit = 1.0 / top_k
    full = np.zeros(share.shape, dtype=bool)
    while (over := share > limit * (1 + 1e-12)).any():
        full |= over
        rest = np.where(full, 0.0, share)
        room = 1.0 - limit * full.sum(-1, keepdims=True)
        share = np.where(full, limit, rest * (room / np.maximum(rest.sum(-1, keepdims=True), 1e-300)))
    return share / share.sum(-1, keepdims=True)
