"""Tells load that a few experts got on top of what there was from load of another kind.

A few alike requests give some experts a multiple of their load and leave all others in the proportions they had; that
passes more often than it lasts. Another task changes the proportions of nearly all experts. The proportion that most
of the load keeps is a median, so that the experts that stand out do not move it (robust regression; Rousseeuw, 1984).
"""

from __future__ import annotations

import numpy as np

from equipoise.algorithms.forecast.window_weights import there_and_back

NEAR = 0.3  # part by which an expert may differ from what most do, and count as one of them
FAR = 2.0  # times more or less than most, of an expert that stands out
MOST = 0.85  # of the common load is on experts that are near, and of the squared change on those that stand out
APART = 0.1  # of the squared distance of unrelated loads: from there on two windows are of two kinds


def is_burst(before: np.ndarray, now: np.ndarray) -> bool:
    """Whether loads (L, E) differ by what few experts have more, or less, and else are as they were."""
    ratio = now / np.maximum(before, 1e-300)
    order = np.argsort(ratio, axis=1, kind="stable")
    below = np.cumsum(np.take_along_axis(before, order, axis=1), axis=1)
    middle = (below < 0.5 * below[:, -1:]).sum(1, keepdims=True)
    usual = np.take_along_axis(ratio, np.take_along_axis(order, middle, axis=1), axis=1)
    near = np.abs(ratio - usual) < NEAR * usual
    far = (ratio > FAR * usual) | (ratio * FAR < usual)
    common, change = np.minimum(usual * before, now), (now - usual * before) ** 2
    return bool((common * near).sum() > MOST * common.sum() and (change * far).sum() > MOST * change.sum())


def burst_has_passed(share: np.ndarray, distance: list[list[float]]) -> bool:
    """Whether the second of three windows was a burst: too few to tell by distances, which alternating load has too."""
    return there_and_back(distance) and is_burst(share[0], share[1])


def are_of_two_kinds(before: np.ndarray, now: np.ndarray) -> bool:
    """Whether loads (L, E) are of different kinds, where drift sets windows apart by a few hundredths of that.

    Loads that have nothing to do with each other are as far apart as both together are from level ones.
    """
    from_level = sum(((load - load.mean(1, keepdims=True)) ** 2).sum() for load in (before, now))
    return bool(((now - before) ** 2).sum() >= APART * from_level)
