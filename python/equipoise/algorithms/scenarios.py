"""Scenarios: what the next window may look like, drawn from the windows that were.

A sum of windows hides how they differ. Each window stays apart, scaled so that a perfectly balanced rank carries 1,
and is weighted by ``decay ** age``. Windows from before a shift of the workload are dropped.

What differs from one window to the next is split in two: *counting*, whose square grows with an expert's load m (a
window holds so many tokens), and *drift*, whose square grows with m squared (an expert gains or loses popularity).
Counting averages out over windows, drift does not: where all is counting, the mean of the windows predicts best, and
where all is drift, the last one does. The decay is picked per plan by one-step backtest: each window but the first is
predicted from the ones before it, and the decay with the least squared error wins; with two or three windows to test
on, that is a noisy choice, and the split leans on it. The same split says how far off a prediction will be.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from equipoise.jit import helper, kernel, number, zeros

NUM_SCENARIOS = 4  # fixed, so that the inner loops are one vector instruction; older windows share a scenario
DECAYS = (0.02, 0.25, 0.5, 0.75, 1.0)
SHIFT = 5.0  # times larger than all others is the change between windows that counts as a shift
LEANING = 0.3  # part by which a backtest's error counts more for a decay that is 1 off what drift and counting say
_NEGLIGIBLE_WEIGHT = 1e-3


class Scenarios(NamedTuple):
    """Loads to plan for."""

    tokens: np.ndarray  # (L, E, NUM_SCENARIOS) float64; an expert's load, where a mean rank has 1
    weight: np.ndarray  # (NUM_SCENARIOS,) float64, sums to 1; 0 for scenarios that are not in use
    noise: np.ndarray  # (L, E) float64, variance of an expert's next load around the forecast; 0 for a single window
    any_load: np.ndarray  # (L,) bool; False for a layer that saw no token
    decay: float


def make_scenarios(load: np.ndarray, total: float) -> Scenarios:
    """Scenarios from (T, L, E) tokens, oldest first; ``total`` is the sum of all ranks' capacity, G when alike."""
    num_windows = load.shape[0]
    share = np.empty(load.shape)
    any_load = np.empty(load.shape[1], dtype=np.bool_)
    _normalise(load, total, share, any_load)
    first = _last_shift(share)
    # Nothing but one window after a shift: those before it still tell how load changes.
    told = share[first:] if first < num_windows - 1 else share[:first]
    counting, drift = np.zeros(load.shape[1]), np.zeros(load.shape[1])
    part = _fit_changes(told, counting, drift) if len(told) > 1 else 0.0
    share = share[first:]
    num_windows = len(share)
    decay = _backtest(share, 1.0 - part) if num_windows > 1 else 1.0
    weight = decay ** np.arange(num_windows - 1, -1, -1.0)
    weight[weight < _NEGLIGIBLE_WEIGHT * weight.sum()] = 0.0
    weight /= weight.sum()
    tokens = np.zeros((load.shape[1], load.shape[2], NUM_SCENARIOS))
    lanes = np.zeros(NUM_SCENARIOS)
    for age in range(min(num_windows, NUM_SCENARIOS)):
        if age == NUM_SCENARIOS - 1 and num_windows > NUM_SCENARIOS:
            older = slice(0, num_windows - age)
            lanes[age] = weight[older].sum()
            if lanes[age] > 0:
                # Not a matrix product: its order of additions, and so its last bits, depend on the machine.
                tokens[..., age] = sum(w * s for w, s in zip(weight[older], share[older], strict=True)) / lanes[age]
        else:
            lanes[age] = weight[-1 - age]
            tokens[..., age] = share[-1 - age]
    mean = mean_load(tokens, lanes)
    # A forecast from several windows has less counting noise of its own, and as much drift as one.
    noise = (0.5 * (1.0 + float((lanes * lanes).sum())) * counting[:, None] + drift[:, None] * mean) * mean
    return Scenarios(tokens, lanes, noise, any_load, decay)


def mean_load(tokens: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(L, E) mean over the scenarios; added up in one order everywhere, which a matrix product is not."""
    mean = np.zeros(tokens.shape[:2])
    for scenario in range(NUM_SCENARIOS):
        mean += weight[scenario] * tokens[..., scenario]
    return mean


@kernel
def _normalise(load: np.ndarray, total: float, share: np.ndarray, any_load: np.ndarray) -> None:
    """Scales each window of each layer to ``total``; a window without tokens takes the mean of the layer's others."""
    num_windows, num_layers, num_experts = load.shape
    for layer in range(num_layers):
        mean, largest = zeros(num_experts), zeros(num_windows)
        filled = 0
        for window in range(num_windows):
            # Scaled by the largest first: a sum of huge counts overflows, tiny ones vanish.
            top = 0.0
            for expert in range(num_experts):
                top = max(top, load[window, layer, expert])
            largest[window] = top
            if top == 0.0:
                continue
            tokens = 0.0
            for expert in range(num_experts):
                tokens += load[window, layer, expert] / top
            filled += 1
            for expert in range(num_experts):
                part = load[window, layer, expert] / top * (total / tokens)
                share[window, layer, expert] = part
                mean[expert] += part
        any_load[layer] = filled > 0
        for window in range(num_windows):
            if largest[window] == 0.0:
                for expert in range(num_experts):
                    share[window, layer, expert] = mean[expert] / filled if filled else total / num_experts


def _last_shift(share: np.ndarray) -> int:
    """The window that a shift of the workload starts with, 0 without one.

    A backtest cannot see a shift in the newest window: nothing after it is known. But there one change from window to
    window stands out from all the others.
    """
    change = [_change(share, window) for window in range(1, share.shape[0])]
    if len(change) < 2:
        return 0
    largest = max(change)
    where = change.index(largest)
    return where + 1 if largest > SHIFT * max(change[:where] + change[where + 1 :]) else 0


@kernel
def _change(share: np.ndarray, window: int) -> float:
    """Squared distance of a window from the one before it, over all layers."""
    total = 0.0
    for layer in range(share.shape[1]):
        for expert in range(share.shape[2]):
            gap = share[window, layer, expert] - share[window - 1, layer, expert]
            total += gap * gap
    return total


def _backtest(share: np.ndarray, expected: float) -> float:
    """The decay of :data:`DECAYS` that would have predicted best; ``expected`` settles what is nearly a tie."""

    def error(decay: float) -> tuple[float, float]:
        off = abs(decay - expected)
        return _backtest_error(share, decay) * (1.0 + LEANING * off), off

    return min(DECAYS, key=error)


@kernel
def _backtest_error(share: np.ndarray, decay: float) -> float:
    """Squared error, over all windows, of predicting each from the decayed mean of those before it."""
    num_windows, num_layers, num_experts = share.shape
    error = 0.0
    for layer in range(num_layers):
        for expert in range(num_experts):
            past, weight = share[0, layer, expert], 1.0
            for window in range(1, num_windows):
                gap = share[window, layer, expert] - past / weight
                error += gap * gap
                past = past * decay + share[window, layer, expert]
                weight = weight * decay + 1.0
    return error


@kernel
def _fit_changes(share: np.ndarray, counting: np.ndarray, drift: np.ndarray) -> float:
    """Splits the squared change of a load m from window to window into ``counting * m + drift * m * m``.

    Least squares of change / m, so that neither the hottest experts nor the coldest decide alone; m is the mean of
    the two windows. Fills both rates, (L,), from each layer's calmest pair of windows: a shift of the workload that
    was not found is no noise. Returns drift's part of all change, 0 to 1, in all pairs and layers.
    """
    num_windows, num_layers, num_experts = share.shape
    pooled = zeros(number(5))
    for layer in range(num_layers):
        least = np.inf
        for window in range(1, num_windows):
            sums = zeros(number(5))
            for expert in range(num_experts):
                mean = 0.5 * (share[window, layer, expert] + share[window - 1, layer, expert])
                gap = share[window, layer, expert] - share[window - 1, layer, expert]
                if mean > 0.0:
                    sums[0] += 1.0
                    sums[1] += mean
                    sums[2] += mean * mean
                    sums[3] += gap * gap / mean
                    sums[4] += gap * gap
            for i in range(5):
                pooled[i] += sums[i]
            if sums[4] < least:
                least = sums[4]
                part = _drift_part(sums)
                counting[layer], drift[layer] = (1.0 - part) * sums[4] / sums[1], part * sums[4] / sums[2]
    return _drift_part(pooled)


@helper
def _drift_part(sums: np.ndarray) -> float:
    """Drift's part of the squared change, from the sums of 1, m, m * m, change / m and change."""
    determinant = sums[0] * sums[2] - sums[1] * sums[1]
    if determinant <= 1e-12 * sums[0] * sums[2] or sums[4] <= 0.0:
        return 0.0
    square = (sums[4] * sums[0] - sums[3] * sums[1]) / determinant
    return min(max(square * sums[2] / sums[4], 0.0), 1.0)
