"""Draws the loads of a single window of counts towards their mean, as far as counting explains how they differ."""

from __future__ import annotations

import math

import numpy as np

from equipoise.algorithms.forecast.scenarios import Scenarios, mean_load


def shrink_to_mean(scenarios: Scenarios) -> Scenarios:
    """The same with each layer's loads drawn towards their mean, as far as counting explains how they differ.

    Empirical Bayes (Robbins, 1956): popularities of a layer are draws from a gamma distribution whose variance t2 is
    that of the loads less that of counting (method of moments). Of a count with error variance c m around the mean m,
    ``t2 / (t2 + c m)`` is kept, and as much of its variance.
    """
    mean = scenarios.mean
    level = mean.mean(1, keepdims=True)
    counting = scenarios.error.mean(1, keepdims=True)
    seen = ((mean - level) ** 2).mean(1, keepdims=True)
    # What is seen of E experts is itself off by a part sqrt(2 / E): that much more is left to differ.
    between = np.maximum(seen, counting) * (1.0 + math.sqrt(2.0 / mean.shape[1])) - counting
    kept = between / np.maximum(between + counting, 1e-300)
    kept[counting == 0.0] = 1.0
    tokens = level[..., None] + kept[..., None] * (scenarios.tokens - level[..., None])
    shrunk = level + kept * (mean - level)
    error = counting / level * shrunk * kept
    noise = counting / level * shrunk + error
    return scenarios._replace(tokens=tokens, noise=noise, error=error, mean=mean_load(tokens, scenarios.weight))
