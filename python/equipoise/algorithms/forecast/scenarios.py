"""Scenarios: what the next window may look like, drawn from the windows that were.

A sum of windows hides how they differ. Each window stays apart, scaled so that a perfectly balanced rank carries 1, and
weighted by what it says about the next one (window_weights.py). Where there are more than :data:`NUM_SCENARIOS`, those
most alike share one, so that rare kinds of load stay apart from common ones (Ward, 1963: each time the two whose union
loses least).

What differs from one window to the next is split in two: *Poisson noise*, whose square grows with an expert's load m
(a window holds so many tokens), and *relative noise*, whose square grows with m squared (an expert gains or loses
popularity). Poisson noise averages out over windows, relative noise does not: where all is Poisson noise, the mean of
the windows predicts best, and where all is relative noise, the last one does. A backtest of two or three windows is a
noisy choice of decay, and leans on that.
The same split says how far off a prediction will be.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from equipoise.algorithms.forecast.burst import are_of_two_kinds, burst_has_passed, is_burst
from equipoise.algorithms.forecast.window_weights import (
    MIXTURE_DECAY,
    THERE_AND_BACK,
    best_decay,
    bursts_of,
    decayed,
    distances,
    is_mixture,
    last_shift,
    recurring,
)
from equipoise.jit.compile import helper, kernel, number, zeros

NUM_SCENARIOS = 4  # fixed, so that the inner loops are one vector instruction
NEWEST = 0.5  # weight of a newest window that may be a burst
PAIR_DECAY = 0.75  # at least, of two windows: whether they drift or go back and forth cannot be told
BURST_DECAY = 0.5  # the same where the newer one may be a burst: it is judged by each alone as well (guard.py)
STEADY = 1.1  # times what counting alone would change: load that changes no more is steady
MAX_WINDOWS = 16  # older ones are left out
LARGEST_COUNT = 2.0**53  # up to which a float tells counts from other loads: beyond it all are whole numbers
GRID = 2.0**32  # parts that the largest load of a window is told in


class Scenarios(NamedTuple):
    """Loads to plan for."""

    tokens: np.ndarray  # (L, E, NUM_SCENARIOS) float64; an expert's load, where a mean rank has 1
    weight: np.ndarray  # (NUM_SCENARIOS,) float64, sums to 1; 0 for scenarios that are not in use
    noise: np.ndarray  # (L, E) float64, variance of an expert's next load around the forecast; 0: not known
    error: np.ndarray  # (L, E) float64, the part of it that counting is off in the forecast itself
    mean: np.ndarray  # (L, E) float64, mean of the tokens over the scenarios
    any_load: np.ndarray  # (L,) bool; False for a layer that saw no token
    decay: float
    mixture: bool  # windows are draws from a mix of tasks
    recurring: bool  # of few kinds, which come back
    steady: bool  # windows of counts that differ by counting noise alone
    unsure: bool  # whether the newest window's load lasts cannot be told: the older ones' may come back
    two_kinds: bool  # two windows, each of a kind of its own: what may change is what sets them apart


def make_scenarios(load: np.ndarray, total: float) -> Scenarios:
    """Scenarios from (T, L, E) tokens, oldest first; ``total`` is the sum of all ranks' capacity, G when alike."""
    load = load[-MAX_WINDOWS:]
    num_windows, num_layers, num_experts = load.shape
    share = np.empty(load.shape)
    any_load = np.empty(num_layers, dtype=np.bool_)
    counts = _normalise(load, total, share, any_load)
    distance = distances(share)
    bursts = bursts_of(distance)
    if num_windows == 3 and burst_has_passed(share, distance):
        bursts = [1]
    if bursts:
        kept = [window for window in range(num_windows) if window not in bursts]
        load, share, num_windows = load[kept], share[kept], len(kept)
        distance = [[distance[i][j] for j in kept] for i in kept]
    mixture = is_mixture(distance)
    first = 0 if mixture else last_shift(distance)
    # Nothing but one window after a shift: those before it still tell how load changes.
    told = share[first:] if first < num_windows - 1 else share[:first]
    order = recurring(distance) if mixture else []
    told = share[order] if order else told  # how kinds of windows differ is in the scenarios already
    poisson, relative, moments = np.zeros(num_layers), np.zeros(num_layers), np.zeros((num_layers, 3))
    part = _fit_changes(told, poisson, relative, moments) if len(told) > 1 else 0.0
    steady = False
    if counts:
        # Of counts it is known how far they are off. In the calmest pair of a few windows it may not show.
        known = 2.0 * total / np.maximum(load[first:].sum(2).max(0), 1.0)
        only_counting = len(told) > 1 and _is_steady(moments, known)
        steady = only_counting and first < num_windows - 1
        if only_counting or num_windows == 1:
            poisson = np.maximum(poisson, known)
    newest_is_new = first == num_windows - 1 > 0 or (num_windows == 2 and not steady)
    unsure = newest_is_new and is_burst(share[:-1].mean(0), share[-1])
    two_kinds = num_windows == 2 and newest_is_new and not unsure and are_of_two_kinds(*share)
    if unsure and num_windows > 2:
        decay, weight = 1.0, [(1.0 - NEWEST) / first] * first + [NEWEST]
    else:
        share, distance = share[first:], [row[first:] for row in distance[first:]]
        of_two = (BURST_DECAY if unsure else PAIR_DECAY) if len(share) == 2 else 0.0
        decay = best_decay(distance, 1.0 - part, at_least=MIXTURE_DECAY if mixture else of_two)
        weight = list(THERE_AND_BACK) if order and num_windows == 3 else decayed(len(share), decay)
    by_scenario, lanes = np.zeros((NUM_SCENARIOS, num_layers, num_experts)), np.zeros(NUM_SCENARIOS)
    for scenario, group in enumerate(_group(weight, distance)):
        lanes[scenario] = sum(weight[window] for window in group)
        if len(group) == 1:
            by_scenario[scenario] = share[group[0]]
        else:  # not a matrix product: its order of additions, and so its last bits, depend on the machine
            for window in group:
                by_scenario[scenario] += weight[window] * share[window]
            by_scenario[scenario] /= lanes[scenario]
    by_expert = by_scenario.transpose(1, 2, 0)
    tokens, mean = np.ascontiguousarray(by_expert), mean_load(by_expert, lanes)
    # A forecast from several windows has less Poisson noise of its own, and as much relative noise as one.
    own = sum(w * w for w in weight)
    noise = (0.5 * (1.0 + own) * poisson[:, None] + relative[:, None] * mean) * mean
    error = 0.5 * own * poisson[:, None] * mean
    return Scenarios(
        tokens, lanes, noise, error, mean, any_load, decay, mixture, bool(order), steady, unsure, two_kinds
    )


def _is_steady(moments: np.ndarray, known: np.ndarray) -> bool:
    """Whether windows differ by no more than counting, whose variance is ``known`` (L,) times the load.

    ``moments`` is from :func:`_fit_changes`. Squared changes of expected size v have the variance 2 v**2, and half as
    much again as neighbours share a window.
    """
    changes, loads, squares = moments.T
    return bool(changes.sum() <= STEADY * (known * loads).sum() + 3.0 * np.sqrt(3.0 * (known * known * squares).sum()))


def _group(weight: list[float], distance: list[list[float]]) -> list[list[int]]:
    """At most :data:`NUM_SCENARIOS` groups of the windows that have a weight, newest first; alike ones together.

    The two groups whose union adds least to the weighted squared distances from the groups' means are joined, until
    few enough are left. The distances between means follow from those between windows (Lance and Williams, 1967).
    """
    groups = {window: [window] for window in range(len(weight) - 1, -1, -1) if weight[window] > 0.0}
    heavy = dict(enumerate(weight))
    apart = {(i, j): distance[i][j] for i in groups for j in groups}
    while len(groups) > NUM_SCENARIOS:
        pairs = [(i, j) for i in groups for j in groups if i > j]
        i, j = min(pairs, key=lambda p: heavy[p[0]] * heavy[p[1]] / (heavy[p[0]] + heavy[p[1]]) * apart[p])
        both = heavy[i] + heavy[j]
        for k in groups:
            joined = (heavy[i] * apart[i, k] + heavy[j] * apart[j, k]) / both
            apart[i, k] = apart[k, i] = joined - heavy[i] * heavy[j] / both**2 * apart[i, j]
        groups[i] += groups.pop(j)
        heavy[i] = both
    return list(groups.values())


def mean_load(tokens: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(L, E) mean over the scenarios; added up in one order everywhere, which a matrix product is not."""
    mean = np.zeros(tokens.shape[:2])
    for scenario in range(NUM_SCENARIOS):
        mean += weight[scenario] * tokens[..., scenario]
    return mean


@kernel
def _normalise(load: np.ndarray, total: float, share: np.ndarray, any_load: np.ndarray) -> bool:
    """Scales each window of each layer to ``total``; a window without tokens takes the mean of the layer's others.

    Returns whether all loads are whole numbers, small enough to be told from others. Rounded on the way, to 1 / GRID of
    the window's largest load. Ranks fitted to one window end level to the last bit, which then chooses how a search
    goes on: without rounding, a load in two units got two placements.
    """
    num_windows, num_layers, num_experts = load.shape
    counts = True
    for layer in range(num_layers):
        mean, largest = zeros(num_experts), zeros(num_windows)
        filled = 0
        for window in range(num_windows):
            # Scaled by the largest first: a sum of huge counts overflows, tiny ones vanish. Sums of parts are exact.
            top = 0.0
            for expert in range(num_experts):
                tokens = load[window, layer, expert]
                top = max(top, tokens)
                counts = counts and tokens == np.floor(tokens)
            largest[window] = top
            counts = counts and top < LARGEST_COUNT
            if top == 0.0:
                continue
            tokens = 0.0
            for expert in range(num_experts):
                share[window, layer, expert] = np.floor(load[window, layer, expert] / top * GRID + 0.5)
                tokens += share[window, layer, expert]
            filled += 1
            for expert in range(num_experts):
                share[window, layer, expert] *= total / tokens
                mean[expert] += share[window, layer, expert]
        any_load[layer] = filled > 0
        for window in range(num_windows):
            if largest[window] == 0.0:
                for expert in range(num_experts):
                    share[window, layer, expert] = mean[expert] / filled if filled else total / num_experts
    return counts


@kernel
def _fit_changes(share: np.ndarray, poisson: np.ndarray, relative: np.ndarray, moments: np.ndarray) -> float:
    """Splits the squared change of a load m from window to window into ``poisson * m + relative * m * m``.

    Least squares of change / m, so that neither the hottest experts nor the coldest decide alone; m is the mean of
    the two windows. Fills both rates, (L,), from each layer's calmest pair of windows: a shift of the workload that
    was not found is no noise. Fills ``moments`` (L, 3), of all pairs: the sums of the squared change, of the later load
    and of its square. Returns the relative part of all change, 0 to 1, in all pairs and layers.
    """
    num_windows, num_layers, num_experts = share.shape
    pooled, sums = zeros(number(5)), zeros(number(5))
    for layer in range(num_layers):
        least, changes, loads, squares = np.inf, 0.0, 0.0, 0.0
        for window in range(1, num_windows):
            # Variables: in an array, each addition would wait for the one before it to be stored.
            count, means, mean_squares, parts, known = 0.0, 0.0, 0.0, 0.0, 0.0
            for expert in range(num_experts):
                later = share[window, layer, expert]
                mean = 0.5 * (later + share[window - 1, layer, expert])
                gap = later - share[window - 1, layer, expert]
                changes += gap * gap
                loads += later
                squares += later * later
                if mean > 0.0:
                    count += 1.0
                    means += mean
                    mean_squares += mean * mean
                    parts += gap * gap / mean
                    known += gap * gap
            sums[0], sums[1], sums[2], sums[3], sums[4] = count, means, mean_squares, parts, known
            for i in range(5):
                pooled[i] += sums[i]
            if known < least:
                least = known
                part = _relative_part(sums)
                poisson[layer], relative[layer] = (1.0 - part) * known / means, part * known / mean_squares
        moments[layer, 0], moments[layer, 1], moments[layer, 2] = changes, loads, squares
    return _relative_part(pooled)


@helper
def _relative_part(sums: np.ndarray) -> float:
    """The relative part of the squared change, from the sums of 1, m, m * m, change / m and change."""
    determinant = sums[0] * sums[2] - sums[1] * sums[1]
    if determinant <= 1e-12 * sums[0] * sums[2] or sums[4] <= 0.0:
        return 0.0
    square = (sums[4] * sums[0] - sums[3] * sums[1]) / determinant
    return min(max(square * sums[2] / sums[4], 0.0), 1.0)
