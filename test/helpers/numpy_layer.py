"""One small layer in numpy: the cost of a placement, and of every change to it, computed by their definitions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from equipoise.algorithms.forecast.scenarios import NUM_SCENARIOS

RANKS, SIZE, EXPERTS = 4, 4, 9
SLOTS = RANKS * SIZE


@dataclass(frozen=True)
class Layer:
    """A placement and its load; every quantity is computed from these arrays anew, by its definition."""

    expert: np.ndarray  # (P,)
    share: np.ndarray  # (P,)
    tokens: np.ndarray  # (E, S)
    noise: np.ndarray  # (E,)
    weight: np.ndarray  # (S,)
    slow: np.ndarray  # (G,) 1 / speed

    @classmethod
    def draw(cls, seed: int, *, even: bool, noisy: bool, uneven: bool) -> Layer:
        """No rank holds an expert twice, each expert has a replica, a mean rank has 1."""
        rng = np.random.default_rng(seed)
        expert = np.zeros(SLOTS, dtype=np.int64)
        while len(set(expert.tolist())) < EXPERTS:
            expert = np.concatenate([rng.permutation(EXPERTS)[:SIZE] for _ in range(RANKS)])
        share = np.ones(SLOTS) if even else rng.random(SLOTS) + 0.05
        for e in range(EXPERTS):
            share[expert == e] /= share[expert == e].sum()
        tokens = rng.gamma(0.7, 1.0, (EXPERTS, NUM_SCENARIOS)) + 0.01
        tokens *= RANKS / tokens.sum(0)
        slow = rng.uniform(0.6, 1.5, RANKS) if uneven else np.ones(RANKS)
        weight = rng.dirichlet(np.ones(NUM_SCENARIOS))
        return cls(expert, share, tokens, rng.random(EXPERTS) * 0.1 * noisy, weight, slow)

    def slot_loads(self) -> np.ndarray:
        """(P, S)"""
        risk = self.noise[self.expert] * self.share**2
        return self.share[:, None] * self.tokens[self.expert] + risk[:, None]

    def rank_loads(self) -> np.ndarray:
        """(G, S)"""
        return self.slot_loads().reshape(RANKS, SIZE, -1).sum(1) * self.slow[:, None]

    def cost(self, q: int) -> np.ndarray:
        """(G,)"""
        return (self.weight * self.rank_loads() ** q).sum(1)

    def slope(self, q: int) -> np.ndarray:
        """(G, S) derivative of the cost by a rank's tokens, over q."""
        return self.weight * self.rank_loads() ** (q - 1) * self.slow[:, None]

    def replicas(self, e: int) -> np.ndarray:
        return np.flatnonzero(self.expert == e)

    def swap(self, p: int, k: int) -> Layer:
        order = np.arange(SLOTS)
        order[[p, k]] = k, p
        return replace(self, expert=self.expert[order], share=self.share[order])

    def overwrite(self, p: int, k: int, remaining: int, part: float) -> Layer:
        """Slot k leaves its share to ``remaining``, and takes ``part`` of the share of slot p's expert."""
        expert, share = self.expert.copy(), self.share.copy()
        share[remaining] += share[k]
        share[p] -= part
        expert[k], share[k] = expert[p], part
        return replace(self, expert=expert, share=share)

    def overwrite_evenly(self, p: int, k: int) -> Layer:
        expert = self.expert.copy()
        expert[k] = expert[p]
        return replace(self, expert=expert, share=1.0 / np.bincount(expert, minlength=EXPERTS)[expert])

    def gain(self, changed: Layer, q: int) -> float:
        return float(self.cost(q).sum() - changed.cost(q).sum())


def slot_pairs() -> Iterator[tuple[int, int, int, int]]:
    """Every slot p of a rank h against every slot k of another rank c."""
    for p in range(SLOTS):
        for k in range(SLOTS):
            if p // SIZE != k // SIZE:
                yield p, p // SIZE, k, k // SIZE


def may_overwrite(layer: Layer, p: int, k: int) -> bool:
    return len(layer.replicas(layer.expert[k])) > 1 and layer.expert[p] not in on_rank(layer, k // SIZE)


def on_rank(layer: Layer, rank: int) -> np.ndarray:
    return layer.expert[rank * SIZE : (rank + 1) * SIZE]


def marginal(layer: Layer, q: int, rank: int, e: int, share: float) -> float:
    return float((layer.slope(q)[rank] * (layer.tokens[e] + 2.0 * layer.noise[e] * share)).sum())


def leave_to(layer: Layer, q: int, k: int, other: int) -> float:
    """First-order cost (over q) of slot k's share on the slot ``other``, whose load grows by what it grows by."""
    grown = replace(layer, share=np.where(np.arange(SLOTS) == other, layer.share + layer.share[k], layer.share))
    return float((layer.slope(q)[other // SIZE] * (grown.slot_loads() - layer.slot_loads())[other]).sum())


def first_part_gains(layer: Layer, even: bool, q: int, p: int, cool_rank: int) -> bool:
    """Whether a replica of slot p's expert on the cool rank, in a slot of its own, could gain: the search's rule."""
    e, n = layer.expert[p], len(layer.replicas(layer.expert[p]))
    if not even:
        return marginal(layer, q, p // SIZE, e, layer.share[p]) > marginal(layer, q, cool_rank, e, 0.0)
    fewer = replace(layer, share=np.where(layer.expert == e, 1.0 / (n + 1), layer.share))
    less = (layer.slot_loads() - fewer.slot_loads()).reshape(RANKS, SIZE, -1).sum(1)
    part = 1.0 / (n + 1)
    more = part * layer.tokens[e] + layer.noise[e] * part**2
    return bool((layer.slope(q) * less).sum() > (layer.slope(q)[cool_rank] * more).sum())
