"""Judges placements by the balance they may expect of the next window: draws from the forecast and its error.

A placement that was searched for a forecast looks better on that forecast than it is: the search fitted its noise, and
the placement in force did not. So plans are not compared on what they were made from, but on draws of what may come:
the forecast plus an error of the size that forecasts have (scenarios.py). All plans see the same draws (common random
numbers), so what they have in common cancels.

A draw is a gamma variate of the forecast's mean and variance by Wilson and Hilferty's cube (1931): positive, skewed as
counts are, and made from one table of normal numbers, so that a plan is the same on any machine.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from equipoise.algorithms.forecast.scenarios import NUM_SCENARIOS
from equipoise.jit.compile import helper, kernel, zeros

NUM_DRAWS = 32  # half of them mirror the others: what is linear in the errors cancels


class InForce(NamedTuple):
    """A placement in force and the forecast that it is held against, as the kernels take them."""

    placed: np.ndarray  # (L, P) int64
    share: np.ndarray  # (L, P)
    mean: np.ndarray  # (L, E) forecast load, where a mean rank has 1
    error: np.ndarray  # (L, E) variance of that forecast
    num_ranks: int


@cache
def normal_numbers(num_experts: int) -> np.ndarray:
    """(NUM_DRAWS, E) standard normal numbers, the second half the first with its signs changed."""
    half = np.random.default_rng(20240229).standard_normal((NUM_DRAWS // 2, num_experts))
    return np.ascontiguousarray(np.concatenate([half, -half]))


def lanes_of_draws(weight: np.ndarray, num_draws: int = NUM_DRAWS) -> np.ndarray:
    """(num_draws,) scenario that each draw is around, in proportion to their weights, in each half alike.

    Where load is a mix of tasks, the next window is like one of the scenarios, and seldom like their mean.
    """
    half = num_draws // 2
    lanes = np.searchsorted(np.cumsum(weight), (np.arange(half) + 0.5) / half * weight.sum())
    return np.tile(np.minimum(lanes, NUM_SCENARIOS - 1), 2)


@kernel
def judge(
    first: int,
    last: int,
    placed: np.ndarray,
    share: np.ndarray,
    tokens: np.ndarray,
    noise: np.ndarray,
    inverse_speed: np.ndarray,
    normal: np.ndarray,
    lanes: np.ndarray,
    balance: np.ndarray,
) -> None:
    """Fills rows first..last-1 of ``balance`` (K, L, NUM_DRAWS): mean over maximum rank load of each draw, by plan.

    Args:
        placed, share: (K, L, P) of K plans, which all see the same draws.
        tokens: (L, E, NUM_SCENARIOS), as in Scenarios.
        noise: (L, E) variance of a draw around its scenario.
        normal: (NUM_DRAWS, E) from :func:`normal_numbers`.
    """
    num_ranks, drawn = inverse_speed.shape[0], zeros(tokens.shape[1])
    size, live = placed.shape[2] // num_ranks, 0.0
    for rank in range(num_ranks):
        live += 1.0 if inverse_speed[rank] > 0.0 else 0.0
    ninth, deviation = np.empty((tokens.shape[1], NUM_SCENARIOS)), np.empty((tokens.shape[1], NUM_SCENARIOS))
    for layer in range(first, last):
        for e in range(drawn.shape[0]):
            for s in range(NUM_SCENARIOS):
                x, noisy = tokens[layer, e, s], noise[layer, e] > 0.0 and tokens[layer, e, s] > 0.0
                ninth[e, s] = noise[layer, e] / (9.0 * x * x) if noisy else 0.0
                deviation[e, s] = np.sqrt(ninth[e, s])
        for draw in range(normal.shape[0]):
            s = lanes[draw]
            for e in range(drawn.shape[0]):
                root = max(1.0 - ninth[e, s] + normal[draw, e] * deviation[e, s], 0.0)
                drawn[e] = tokens[layer, e, s] * (root * root * root)
            for plan in range(placed.shape[0]):
                total, top = 0.0, 0.0
                for rank in range(num_ranks):
                    load = 0.0
                    for slot in range(rank * size, (rank + 1) * size):
                        load += share[plan, layer, slot] * drawn[placed[plan, layer, slot]]
                    total += load
                    top = max(top, load * inverse_speed[rank])
                balance[plan, layer, draw] = total / live / top if top > 0.0 else 1.0


@kernel
def level_prior(
    first: int, last: int, in_force: InForce, factor: np.ndarray, excess: np.ndarray, highest: np.ndarray
) -> None:
    """Draws the forecast towards one that levels the ranks of a placement, as far as its own error explains.

    With rank loads ``d_r`` off the mean, of which the forecast's error makes up the variance ``n_r``, the placement
    itself is off by ``t2 = max(0, mean d2 - mean n)`` (method of moments). Given that, an expert's load x with error
    variance v is best corrected by ``- v sum_r share_r d_r / (n_r + t2)`` (a Kalman update by rank).

    Fills rows first..last-1 of ``factor`` (L, E), corrected over given load, and, per layer, ``excess`` (L,),
    ``mean d2 / mean n``, and ``highest`` (L,), the largest ``d_r / sqrt(2 n_r)``.
    """
    placed, share, mean, error, num_ranks = in_force
    size = placed.shape[1] // num_ranks
    gap, spread = zeros(num_ranks), zeros(num_ranks)
    for layer in range(first, last):
        squares, errors, highest[layer] = 0.0, 0.0, 0.0
        _off_the_mean(placed[layer], share[layer], mean[layer], error[layer], gap, spread)
        for rank in range(num_ranks):
            squares += gap[rank] * gap[rank] / num_ranks
            errors += spread[rank] / num_ranks
            highest[layer] = max(highest[layer], gap[rank] / np.sqrt(2.0 * spread[rank]))
        excess[layer] = squares / errors
        misfit = max(squares - errors, 0.0)
        for e in range(mean.shape[1]):
            factor[layer, e] = mean[layer, e]
        for slot in range(placed.shape[1]):
            e, rank = placed[layer, slot], slot // size
            factor[layer, e] -= error[layer, e] * share[layer, slot] * gap[rank] / (spread[rank] + misfit)
        for e in range(mean.shape[1]):
            known = mean[layer, e]
            factor[layer, e] = max(factor[layer, e] / known, 0.1) if known > 0.0 else 1.0


@kernel
def gaps_between_replicas(first: int, last: int, in_force: InForce, excess: np.ndarray, width: np.ndarray) -> None:
    """Measures what other shares could level: ranks that hold a replica of the same expert, and no others.

    Of each expert it is what the loads of its ranks are off their mean (but for hotter ones where it has no share to
    give away). Fills rows first..last-1 of ``width`` (L,), the root mean square, and ``excess`` (L,), the sum of
    squares over its expected value where the forecast's error alone makes them differ (analysis of variance).
    """
    placed, share, mean, error, num_ranks = in_force
    num_experts, size = mean.shape[1], placed.shape[1] // num_ranks
    gap, spread = zeros(num_ranks), zeros(num_ranks)
    level, serving = zeros(num_experts), zeros(num_experts)
    for layer in range(first, last):
        _off_the_mean(placed[layer], share[layer], mean[layer], error[layer], gap, spread)
        level[:], serving[:] = 0.0, 0.0
        for slot in range(placed.shape[1]):
            if share[layer, slot] > 0.0:
                level[placed[layer, slot]] += gap[slot // size]
                serving[placed[layer, slot]] += 1.0
        squares, expected, freedom = 0.0, 1e-12, 1e-12
        for slot in range(placed.shape[1]):
            e, rank = placed[layer, slot], slot // size
            off = gap[rank] - level[e] / max(serving[e], 1.0)
            if share[layer, slot] > 0.0:
                squares += off * off
                expected += spread[rank] * (1.0 - 1.0 / serving[e])
                freedom += 1.0 - 1.0 / serving[e]
            elif off < 0.0:
                squares += off * off
                expected += spread[rank]
                freedom += 1.0
        excess[layer], width[layer] = squares / expected, np.sqrt(squares / freedom)


@helper
def _off_the_mean(
    placed: np.ndarray, share: np.ndarray, mean: np.ndarray, error: np.ndarray, gap: np.ndarray, spread: np.ndarray
) -> None:
    """Fills ``gap`` (G,), what rank loads of one layer are off 1, and ``spread`` (G,), the variance of their error."""
    size = placed.shape[0] // gap.shape[0]
    for rank in range(gap.shape[0]):
        off, variance = -1.0, 1e-12
        for slot in range(rank * size, (rank + 1) * size):
            part, e = share[slot], placed[slot]
            off += part * mean[e]
            variance += part * part * error[e]
        gap[rank], spread[rank] = off, variance
