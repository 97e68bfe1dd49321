"""Scenarios: what the next window may look like, drawn from the windows that were.

A sum of windows hides how they differ. Each window stays apart, scaled so that a perfectly balanced rank carries 1,
and is weighted by ``decay ** age``. The decay is picked per plan by one-step backtest: each window but the first is
predicted from the ones before it, and the decay with the least squared error wins. Steady load picks 1 (all windows
count alike), restless load .02 (only the last one does). Windows from before a shift of the workload are dropped.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from equipoise.algorithms.kernel import kernel

NUM_SCENARIOS = 4  # fixed, so that the inner loops are one vector instruction; older windows share a scenario
DECAYS = (0.02, 0.25, 0.5, 0.75, 1.0)
SHIFT = 5.0  # times larger than all others is the change between windows that counts as a shift
_NEGLIGIBLE_WEIGHT = 1e-3


class Scenarios(NamedTuple):
    """Loads to plan for."""

    tokens: np.ndarray  # (L, E, NUM_SCENARIOS) float64; an expert's load, where a mean rank has 1
    weight: np.ndarray  # (NUM_SCENARIOS,) float64, sums to 1; 0 for scenarios that are not in use
    noise: np.ndarray  # (L, E) float64, variance of an expert's load from window to window; 0 for a single window
    any_load: np.ndarray  # (L,) bool; False for a layer that saw no token
    decay: float


def make_scenarios(load: np.ndarray, total: float) -> Scenarios:
    """Scenarios from (T, L, E) tokens, oldest first; ``total`` is the sum of all ranks' capacity, G when alike."""
    num_windows = load.shape[0]
    share = np.empty(load.shape)
    any_load = np.empty(load.shape[1], dtype=np.bool_)
    _normalise(load, total, share, any_load)
    share = share[_last_shift(share) :]
    num_windows = len(share)
    decay = _backtest(share) if num_windows > 1 else 1.0
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
    noise = np.zeros(load.shape[1:])
    if num_windows > 1:
        _noise(share, tokens, lanes, noise)
    return Scenarios(tokens, lanes, noise, any_load, decay)


@kernel
def _normalise(load: np.ndarray, total: float, share: np.ndarray, any_load: np.ndarray) -> None:
    """Scales each window of each layer to ``total``; a window without tokens takes the mean of the layer's others."""
    num_windows, num_layers, num_experts = load.shape
    for layer in range(num_layers):
        mean = np.zeros(num_experts)
        filled = 0
        empty = np.zeros(num_windows, dtype=np.bool_)
        for window in range(num_windows):
            # Scaled by the largest first: a sum of huge counts overflows, tiny ones vanish.
            top = 0.0
            for expert in range(num_experts):
                top = max(top, load[window, layer, expert])
            if top == 0.0:
                empty[window] = True
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
            if empty[window]:
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


def _backtest(share: np.ndarray) -> float:
    errors = [_backtest_error(share, decay) for decay in DECAYS]
    return DECAYS[errors.index(min(errors))]


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
def _noise(share: np.ndarray, tokens: np.ndarray, weight: np.ndarray, noise: np.ndarray) -> None:
    """Variance of each expert's load, a part proportional to the load (counting) and one to its square (drift).

    Both rates are fitted, per layer and over all experts, to the calmest pair of adjacent windows: a shift of the
    workload is no noise.
    """
    num_windows, num_layers, num_experts = share.shape
    for layer in range(num_layers):
        calmest, least = 1, np.inf
        for window in range(1, num_windows):
            change = 0.0
            for expert in range(num_experts):
                gap = share[window, layer, expert] - share[window - 1, layer, expert]
                change += gap * gap
            if change < least:
                calmest, least = window, change
        # Least moments of variance ~ linear * mean + square * mean**2.
        first, second, third, change, leaning = 0.0, 0.0, 0.0, 0.0, 0.0
        for expert in range(num_experts):
            mean = 0.5 * (share[calmest, layer, expert] + share[calmest - 1, layer, expert])
            gap = share[calmest, layer, expert] - share[calmest - 1, layer, expert]
            first += mean
            second += mean * mean
            third += mean * mean * mean
            change += 0.5 * gap * gap
            leaning += 0.5 * gap * gap * mean
        determinant = first * third - second * second
        linear, square = change / first, 0.0
        if determinant > 1e-12 * first * third:
            linear = (change * third - leaning * second) / determinant
            square = (leaning * first - change * second) / determinant
            if square < 0.0:
                linear, square = change / first, 0.0
            elif linear < 0.0:
                linear, square = 0.0, change / second
        for expert in range(num_experts):
            mean = 0.0
            for lane in range(weight.shape[0]):
                mean += weight[lane] * tokens[layer, expert, lane]
            noise[layer, expert] = (linear + square * mean) * mean
