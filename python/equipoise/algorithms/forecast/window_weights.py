"""How much each past window says about the next one.

All that is needed are the distances between windows, each a point with a coordinate per layer and expert. Load changes
in four ways, and each wants other weights:

- **Drift**: popularity wanders. Windows are the less alike the longer apart, and each step goes a way of its own. The
  last windows tell most: weights ``decay ** age``, with the decay that would have predicted each window best from those
  before it (one-step backtest).
- **Shift**: one change between neighbours stands out from all others. The windows before it are dropped; a backtest
  cannot see that in the newest window, since nothing after it is known.
- **Burst**: one window stands out, and the one after it is as those before. It tells nothing about the next one.
- **Mixture**: each window is a draw from a mix of tasks, and the next one will be another. Then windows are as alike
  when they are far apart as when they are neighbours; or they go back and forth along a few directions, which the drift
  of many experts does not. The last window is hardly better than the others, and what looks like a shift is none.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from equipoise.jit.compile import kernel

DECAYS = (0.02, 0.25, 0.5, 0.75, 1.0)
SHIFT = 5.0  # times larger than all others is the change between neighbours that counts as a shift
LEANING = 0.3  # part by which a backtest's error counts more for a decay that is 1 off what drift and counting say
MIXTURE_DECAY = 0.75  # at least; a mix changes as well, slowly
MIXTURE_LIKENESS = 0.75  # of neighbours' distances to all others: drift has .43 over four windows, draws 1
MIXTURE_SPREAD = 0.3  # see _spread: drift has .9 to 1, draws that differ in every expert about .6
RECURRING = 0.5  # of neighbours' distances are those along a way from like to like, where kinds of load come back
THERE_AND_BACK = (0.25, 0.5, 0.25)  # weights of three windows, the outer two alike: either kind may come
MIN_CHANGES = 1.5  # that matter, for their directions to tell anything
_NEGLIGIBLE = 1e-3  # of all weight


def distances(share: np.ndarray) -> list[list[float]]:
    """Squared distances between all pairs of the windows in (T, L, E)."""
    squared = np.zeros((len(share), len(share)))
    _distances(share, squared)
    return squared.tolist()


def is_mixture(distance: list[list[float]]) -> bool:
    """Whether windows are draws that come and go, rather than steps that lead away."""
    num_windows = len(distance)
    if num_windows < 3:
        return False
    near = [distance[i][i + 1] for i in range(num_windows - 1)]
    far = [distance[i][j] for i in range(num_windows) for j in range(i + 2, num_windows)]
    if sum(near) * len(far) >= MIXTURE_LIKENESS * sum(far) * len(near):
        return True
    return num_windows > 3 and _spread(distance) < MIXTURE_SPREAD


def recurring(distance: list[list[float]]) -> list[int]:
    """The windows in an order that has those of a kind side by side; empty where there are no kinds.

    Starts with the newest and goes on to the nearest that is left. Of three windows the outer two must be alike.
    """
    if len(distance) == 3:
        return [2, 0, 1] if there_and_back(distance) else []
    left = list(range(len(distance) - 1))
    chain, steps = [len(distance) - 1], 0.0
    while left:
        chain.append(min(left, key=lambda window: (distance[chain[-1]][window], -window)))
        left.remove(chain[-1])
        steps += distance[chain[-2]][chain[-1]]
    near = sum(distance[i][i + 1] for i in range(len(distance) - 1))
    return chain if steps < RECURRING * near else []


def there_and_back(distance: list[list[float]]) -> bool:
    """Whether of three windows the outer two are alike, and the middle one is far from both."""
    return min(distance[0][1], distance[1][2]) > SHIFT * distance[0][2]


def bursts_of(distance: list[list[float]]) -> list[int]:
    """Windows between two that are alike, and far from every other: what made them different has passed.

    Where there were some, a newest window that is far from every other is one more. Three windows are too few.
    """
    num_windows = len(distance)
    nearest = [min((row[j] for j in range(num_windows) if j != i), default=0.0) for i, row in enumerate(distance)]
    inner = range(1, num_windows - 1) if num_windows > 3 else range(0)
    found = [i for i in inner if nearest[i] > SHIFT * distance[i - 1][i + 1]]
    others = [i for i in range(num_windows) if i not in found]
    steps = [distance[i][j] for i, j in pairwise(others)]
    if found and len(steps) > 1 and steps[-1] > SHIFT * max(steps[:-1]):
        found.append(num_windows - 1)
        steps.pop()
    return found if found and min(nearest[i] for i in found) > SHIFT * max(steps) else []


def last_shift(distance: list[list[float]]) -> int:
    """The window that a shift of the workload starts with, 0 without one."""
    change = [distance[i][i + 1] for i in range(len(distance) - 1)]
    if len(change) < 2:
        return 0
    largest = max(change)
    where = change.index(largest)
    return where + 1 if largest > SHIFT * max(change[:where] + change[where + 1 :]) else 0


def best_decay(distance: list[list[float]], expected: float, at_least: float) -> float:
    """The decay of :data:`DECAYS` that would have predicted best; ``expected`` settles what is nearly a tie."""

    def error(decay: float) -> tuple[float, float]:
        off = abs(decay - expected)
        return _backtest_error(distance, decay) * (1.0 + LEANING * off), off

    return min((decay for decay in DECAYS if decay >= at_least), key=error)


def decayed(num_windows: int, decay: float) -> list[float]:
    """Weights of windows, oldest first, that sum to 1; 0 instead of next to nothing."""
    weight = [decay**age for age in range(num_windows - 1, -1, -1)]
    least = _NEGLIGIBLE * sum(weight)
    weight = [w if w >= least else 0.0 for w in weight]
    total = sum(weight)
    return [w / total for w in weight]


def _backtest_error(distance: list[list[float]], decay: float) -> float:
    """Squared error, over all windows, of predicting each from the decayed mean of those before it.

    From a point to a weighted mean of points, it is the mean squared distance to them minus half of that among them.
    With the newest window's weight as 1, the sums over weights and over pairs follow from those of the window before.
    """
    error, total, pairs = 0.0, 1.0, 0.0
    for window in range(1, len(distance)):
        off = sum(decay ** (window - 1 - i) * distance[window][i] for i in range(window))
        error += off / total - pairs / total**2
        total, pairs = 1.0 + decay * total, decay**2 * pairs + decay * off
    return error


def _spread(distance: list[list[float]]) -> float:
    """In how many directions windows change, as part of the changes that matter: 0 for one direction, 1 for as many.

    Both numbers are participation ratios, of the inner products G of the changes: ``trace(G)**2 / sum(G**2)`` is n for
    n like changes at right angles, as drift of many experts makes them, and 1 where all lie on one line; with the
    diagonal alone it is the number of changes that are not small beside others. Where that is one, as around a shift,
    there is nothing to tell: 1.
    """
    num = len(distance) - 1
    inner = [
        [0.5 * (distance[i + 1][j] + distance[i][j + 1] - distance[i + 1][j + 1] - distance[i][j]) for j in range(num)]
        for i in range(num)
    ]
    lengths = sum(inner[i][i] for i in range(num)) ** 2
    if lengths <= 0.0:
        return 1.0
    changes = lengths / sum(inner[i][i] ** 2 for i in range(num))
    directions = lengths / sum(product**2 for row in inner for product in row)
    return (directions - 1.0) / (changes - 1.0) if changes >= MIN_CHANGES else 1.0


@kernel
def _distances(share: np.ndarray, squared: np.ndarray) -> None:
    num_windows, num_layers, num_experts = share.shape
    for later in range(num_windows):
        for earlier in range(later):
            a, b, c, d = 0.0, 0.0, 0.0, 0.0  # four sums, so that an addition need not wait for the one before it
            for layer in range(num_layers):
                one, other = share[later, layer], share[earlier, layer]
                for e in range(0, num_experts - 3, 4):
                    a += (one[e] - other[e]) ** 2
                    b += (one[e + 1] - other[e + 1]) ** 2
                    c += (one[e + 2] - other[e + 2]) ** 2
                    d += (one[e + 3] - other[e + 3]) ** 2
                for e in range(num_experts // 4 * 4, num_experts):
                    a += (one[e] - other[e]) ** 2
            squared[later, earlier] = (a + b) + (c + d)
            squared[earlier, later] = squared[later, earlier]
