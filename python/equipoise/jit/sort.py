"""A sort whose ties are the same everywhere, and whose kernel compiles in a moment (numba's own takes seconds)."""

from __future__ import annotations

import numpy as np

from equipoise.jit.compile import helper, int_zeros


@helper
def descending(values: np.ndarray) -> np.ndarray:
    """Indices of ``values`` from the largest to the smallest, equal ones by ascending index. Merge sort."""
    size = values.shape[0]
    order, other = int_zeros(size), int_zeros(size)
    for i in range(size):
        order[i] = i
    width = 1
    while width < size:
        for first in range(0, size, 2 * width):
            middle, last = min(first + width, size), min(first + 2 * width, size)
            left, right = first, middle
            for i in range(first, last):
                if left < middle and (right >= last or values[order[left]] >= values[order[right]]):
                    other[i] = order[left]
                    left += 1
                else:
                    other[i] = order[right]
                    right += 1
        order, other = other, order
        width *= 2
    return order
