"""Water-fill of one expert's tokens over its replicas, in integers: numba."""

from __future__ import annotations

import numpy as np

from equipoise.jit.compile import helper


@helper
def shifted_level(bid: np.ndarray, tokens: int, is_open: np.ndarray, m: int, size: int, exact: int) -> int:
    """Shifts a row's bids so that the least is 0 and finds the level up to which ``tokens`` fill the open ones.

    Not ``exact``: with a reciprocal in place of the division, a unit or two less.
    """
    least = 1 << 62
    for j in range(size):
        if is_open[m, j]:
            least = min(least, bid[j])
    for j in range(size):
        bid[j] = min(bid[j] - least, tokens + 1) if is_open[m, j] else tokens + 1
    level = tokens + 1
    while True:
        below, total = 0, tokens
        for j in range(size):
            if is_open[m, j] and bid[j] <= level:
                below += 1
                total += bid[j]
        lower = total // below if exact else (2 * total * min((1 << 31) // below, (1 << 31) - 1)) >> 32
        if lower >= level:
            return level
        level = lower
