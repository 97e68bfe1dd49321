"""Synthetic load for each weak spot of a planner: noise, alternation, mixing, bursts, shifts, drift, few slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from algorithms_workloads import Sequence
from equipoise.algorithms.rebalance import rebalance_experts
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology

SHAPES = {
    # name: (topology, logical experts, top-k)
    "288/32": (EpTopology(32, 4, 9), 256, 8),
    "288/144": (EpTopology(144, 18, 2), 256, 8),
    "96/32": (EpTopology(32, 4, 3), 64, 6),
    "80/16": (EpTopology(16, 2, 5), 64, 6),
}
WINDOW_TOKENS = 8192
DRIFT = 0.1  # of an expert's popularity, from window to window
BURST_EVERY = 4  # windows, of which one has a third of its tokens on a sixteenth of the experts


class OneWindow(NamedTuple):
    """A placement in force, one window of counts, and windows of the same popularity to score on."""

    name: str
    topology: EpTopology
    current: ExpertLocationMetadata
    window: np.ndarray  # (L, E)
    later: np.ndarray  # (T, L, E)


def popularity(rng: np.random.Generator, num_layers: int, num_experts: int, top_k: int, shape: float) -> np.ndarray:
    """(L, E) gamma popularities that sum to 1, none above 1 / top_k, which is an expert that every token chooses."""
    share = rng.gamma(shape, 1.0, (num_layers, num_experts))
    share /= share.sum(1, keepdims=True)
    for _ in range(20):
        share = np.minimum(share, 1.0 / top_k)
        share /= share.sum(1, keepdims=True)
    return share


def counted(rng: np.random.Generator, share: np.ndarray, assignments: float) -> np.ndarray:
    """Poisson counts of ``share`` (..., E) in a window of ``assignments`` expert choices."""
    return rng.poisson(share * assignments).astype(np.float64)


def weak_spots(num_windows: int, num_layers: int, seed: int = 0, window_tokens: int = WINDOW_TOKENS) -> list[Sequence]:
    """Two workloads that alternate, mix, shift; one with bursts, one that drifts, in every shape."""
    found = []
    for name, (topology, num_experts, top_k) in SHAPES.items():
        rng = np.random.default_rng([seed, topology.num_slots, topology.num_ranks])
        one, other = (popularity(rng, num_layers, num_experts, top_k, 0.6) for _ in range(2))
        for kind, share_of in _kinds(one, other, num_windows, rng).items():
            windows = np.stack([counted(rng, share_of(step), window_tokens * top_k) for step in range(num_windows)])
            found.append(Sequence(f"{kind} {name}", windows, topology, "weak spot"))
    return found


def _kinds(
    one: np.ndarray, other: np.ndarray, num_windows: int, rng: np.random.Generator
) -> dict[str, Callable[[int], np.ndarray]]:
    def mixing(step: int) -> np.ndarray:
        part = 0.5 + 0.5 * np.sin(step)
        return part * one + (1.0 - part) * other

    def bursts(step: int) -> np.ndarray:
        if step % BURST_EVERY != BURST_EVERY - 1:
            return one
        hot = rng.permuted(np.tile(np.arange(one.shape[1]) < one.shape[1] // 16, (len(one), 1)), axis=1)
        return one * (2 / 3) + hot / hot.sum(1, keepdims=True) / 3

    drifting = _drift(one, num_windows, rng.spawn(1)[0])
    return {
        "alternating": lambda step: other if step % 2 else one,
        "mixing": mixing,
        "shift": lambda step: other if step >= num_windows // 3 else one,
        "bursts": bursts,
        "drift": lambda step: drifting[step],
    }


def _drift(share: np.ndarray, num_windows: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Each window's popularities: those before, each changed by a factor with a spread of :data:`DRIFT`."""
    found = [share]
    while len(found) < num_windows:
        changed = found[-1] * np.exp(rng.normal(0.0, DRIFT, share.shape))
        found.append(changed / changed.sum(1, keepdims=True))
    return found


def stationary(shape: str, window_tokens: int, num_windows: int, num_layers: int, seed: int = 0) -> Sequence:
    """Windows of one popularity: what differs is counting noise alone."""
    topology, num_experts, top_k = SHAPES[shape]
    rng = np.random.default_rng([seed, window_tokens, topology.num_slots])
    share = popularity(rng, num_layers, num_experts, top_k, 0.6)
    windows = np.stack([counted(rng, share, window_tokens * top_k) for _ in range(num_windows)])
    return Sequence(f"stationary {shape}, {window_tokens} tokens", windows, topology, "stationary")


def one_window_problems(number: int, seed: int = 0) -> Iterator[OneWindow]:
    """Random problems of 8 to 1000 tokens an expert; the placement in force may be the best there is."""
    rng = np.random.default_rng(seed)
    for _ in range(number):
        topology = EpTopology(int(rng.choice([4, 8, 16, 32])), 1, int(rng.choice([2, 3, 5, 9])))
        num_experts = max(2, int(topology.num_slots * rng.uniform(0.6, 0.95)))
        assignments = num_experts * float(np.exp(rng.uniform(np.log(8), np.log(1000))))
        kind, shape = [("uniform", 1e9), ("mild", 8.0), ("skewed", 0.6)][int(rng.integers(3))]
        share = popularity(rng, 4, num_experts, 1, shape)
        start = ("contiguous", "knows the popularity", "published, of another window")[int(rng.integers(3))]
        if start == "contiguous":
            current = ExpertLocationMetadata.trivial(4, num_experts, topology)
        elif start == "knows the popularity":
            current = rebalance_experts(np.round(share * 1e7), topology)
        else:
            current = rebalance_experts(counted(rng, share, assignments), topology, algorithm="deepseek")
        later = np.stack([counted(rng, share, assignments) for _ in range(24)])
        name = f"{kind}, {topology.num_slots}/{topology.num_ranks}, {assignments / num_experts:.0f} an expert, {start}"
        yield OneWindow(name, topology, current, counted(rng, share, assignments), later)
