"""What moves cost: by how long they serve, and by how much of a rank one move is."""

from __future__ import annotations

import numpy as np
import pytest

from equipoise.algorithms.improve import LASTS, price_of_moves
from equipoise.algorithms.problem import PlacementProblem
from equipoise.algorithms.task import Task
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology


def drifting(num_windows: int, num_layers: int, num_experts: int, seed: int = 0) -> np.ndarray:
    """(T, L, E) windows, each popularity some 30% off the one before."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(0.0, 0.3, (num_windows, num_layers, num_experts))
    return np.asarray(rng.poisson(1000.0 * np.exp(steps.cumsum(0))), dtype=float)


def price(load: np.ndarray, topology: EpTopology) -> float:
    problem = PlacementProblem.check(
        load,
        topology,
        current=ExpertLocationMetadata.trivial(*load.shape[1:], topology),
        num_groups=None,
        max_moves_per_layer=None,
        rank_capacity=None,
        live_ranks=None,
        move_price=0.12,
        dispatch="weights",
        tokens_per_step=None,
        num_threads=1,
    )
    return price_of_moves(Task.of(problem))


@pytest.mark.parametrize(
    ("slots_per_rank", "num_windows", "expected"),
    [(2, 5, 0.04), (2, 8, 0.04), (2, 4, 0.072), (2, 2, 0.072), (2, 1, 0.12), (3, 2, 0.12), (3, 5, 0.12), (9, 8, 0.12)],
)
def test_pairs_pay_less_and_a_third_once_the_history_is_long(
    slots_per_rank: int, num_windows: int, expected: float
) -> None:
    topology = EpTopology(8, 2, slots_per_rank)
    assert price(drifting(num_windows, 2, topology.num_slots - 4), topology) == pytest.approx(expected)


def test_load_that_comes_back_pays_for_the_windows_that_moves_serve() -> None:
    one, other = (np.random.default_rng(seed).gamma(0.6, 1000.0, (4, 20)) for seed in range(2))
    alternating = np.random.default_rng(2).poisson(np.stack([one, other] * 4)).astype(float)
    assert price(alternating, EpTopology(8, 2, 3)) == pytest.approx(0.12 / LASTS)
