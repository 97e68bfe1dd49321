"""How much to trust a forecast: exponents and risk prices that fit its error.

The maximum of G rank loads whose forecasts are off by independent normal errors of size sigma behaves like a soft
maximum of the forecasts: extremes of normal numbers approach a Gumbel distribution of scale ``sigma / sqrt(2 ln G)``,
and the expected maximum of numbers with Gumbel errors is their log-sum-exp at that scale. So the exponent that fits is
near ``sqrt(2 ln G) / sigma``. A larger one levels out differences that the next window will not have.
"""

from __future__ import annotations

import math

import numpy as np

MIN_EXPONENT, MAX_EXPONENT = 2.0, 32.0


def exponents(mean: np.ndarray, noise: np.ndarray, num_slots: int, num_ranks: int) -> np.ndarray:
    """(L,) exponents of the power-sum surrogate that suit the forecast error of rank loads.

    Args:
        mean: (L, E) forecast load, where a mean rank has 1.
        noise: (L, E) its variance.
        num_slots, num_ranks: of the ranks that are live.
    """
    # An expert has replicas in proportion to its load, or about; each takes an equal share, on a rank of its own.
    replicas = np.maximum(mean * (num_slots / num_ranks), 1.0)
    sigma = np.sqrt((noise / replicas).sum(1) / num_ranks)
    scale = round(math.sqrt(2.0 * math.log(max(num_ranks, 2))), 6)
    return np.clip(scale / np.maximum(sigma, 1e-9), MIN_EXPONENT, MAX_EXPONENT)
