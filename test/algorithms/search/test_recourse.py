"""Placements with recourse: their value is what a linear program finds for the best shares, scenario by scenario."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from equipoise.algorithms.search.move_price import MoveTerms
from equipoise.algorithms.search.recourse import improve_for_batches

EXPERTS, RANKS, SIZE, SCENARIOS = 12, 6, 3, 4
PRICES = np.array([0.0, 1.0, 2.5])


def best_balance(load: np.ndarray, placed: np.ndarray, speed: np.ndarray) -> float:
    """Mean over maximum of rank load over speed, with the best shares on ranks that are there."""
    live = np.repeat(speed > 0, SIZE)
    slots = np.flatnonzero(live)
    cost = np.append(np.zeros(len(slots)), 1.0)
    over = np.zeros((RANKS, len(slots) + 1))
    over[slots // SIZE, np.arange(len(slots))] = 1.0
    over[:, -1] = -speed
    whole = np.zeros((EXPERTS, len(slots) + 1))
    whole[placed[slots], np.arange(len(slots))] = 1.0
    there = np.isin(np.arange(EXPERTS), placed[slots])
    solved = linprog(cost, over, np.zeros(RANKS), whole[there], load[there])
    assert solved.success
    return float(load.sum() / speed.sum() / solved.fun)


def problem(seed: int, dead: bool, slow: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A placement with every expert on a live rank, scenarios of mean rank load 1, and speeds."""
    rng = np.random.default_rng(seed)
    speed = rng.uniform(0.5, 1.0, RANKS) if slow else np.ones(RANKS)
    speed[rng.integers(RANKS)] *= not dead
    placed = np.zeros(RANKS * SIZE, dtype=np.int64)
    live = np.flatnonzero(np.repeat(speed > 0, SIZE))
    placed[rng.permutation(live)] = np.arange(len(live)) % EXPERTS
    loads = rng.gamma(0.7, 1.0, (EXPERTS, SCENARIOS)) + 1e-3
    return placed, loads / loads.sum(0) * (speed > 0).sum(), speed


def improve(
    placed: np.ndarray, loads: np.ndarray, speed: np.ndarray, moves: MoveTerms, steps: int
) -> tuple[np.ndarray, float]:
    mean = speed.sum() / (speed > 0).sum()
    inverse = np.where(speed > 0, mean / np.maximum(speed, 1e-9), 0.0)
    new, value = placed[None].copy(), np.empty(1)
    improve_for_batches(0, 1, placed[None].copy(), new, value, loads[None].copy(), inverse, 3, moves, steps)
    return new[0], float(value[0])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), dead=st.booleans(), slow=st.booleans())
def test_value_is_that_of_the_best_shares(seed: int, dead: bool, slow: bool) -> None:
    placed, loads, speed = problem(seed, dead, slow)
    for steps in (0, 20):
        new, value = improve(placed, loads, speed, MoveTerms(PRICES, 0.0, 1 << 60), steps)
        expected = np.mean([best_balance(load, new, speed) for load in loads.T])
        assert abs(value - expected) < 1e-3


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), dead=st.booleans(), limit=st.integers(0, 3), price=st.sampled_from([0.0, 1e-3]))
def test_changes_gain_their_price_within_the_limit(seed: int, dead: bool, limit: int, price: float) -> None:
    placed, loads, speed = problem(seed, dead, slow=False)
    _, before = improve(placed, loads, speed, MoveTerms(PRICES, price, limit), 0)
    new, after = improve(placed, loads, speed, MoveTerms(PRICES, price, limit), 20)
    live = np.repeat(speed > 0, SIZE)
    assert set(new[live]) == set(range(EXPERTS))
    assert (new[~live] == placed[~live]).all()
    arrived = [
        np.isin(new[slots], placed[slots], invert=True).sum() for slots in np.arange(len(new)).reshape(RANKS, SIZE)
    ]
    assert sum(arrived) <= limit  # where in its rank an expert lies is settled afterwards
    assert after >= before
    if (new != placed).any():
        assert after > before


def test_connections_level_what_no_shares_could() -> None:
    gained = []
    for seed in range(40):
        placed, loads, speed = problem(seed, dead=False, slow=False)
        moves = MoveTerms(PRICES, 0.0, 1 << 60)
        gained.append(improve(placed, loads, speed, moves, 40)[1] - improve(placed, loads, speed, moves, 0)[1])
    assert np.mean(gained) > 0.05, np.mean(gained)
