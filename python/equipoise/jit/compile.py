"""How inner loops are compiled: by the same few decorators, so that they all round, divide and cache alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numba
import numpy as np

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Compiles a function that Python calls: cached on disk, without the GIL.

    No ``fastmath``: sums keep their order, so a plan is the same on any machine. Division by zero gives infinity, as
    in numpy; a branch that raises would cost more than the division.

    numba keys its cache by the file of the function alone: after editing a helper in another file, ``make kernels``.
    """
    return numba.njit(cache=True, nogil=True, error_model="numpy", no_cfunc_wrapper=True)(function)


def helper(function: F) -> F:
    """Compiles a function that only kernels call, into them.

    It has no wrappers for Python and no cache of its own: a cached kernel holds all that it calls.
    """
    return _helper()(function)


def inlined(function: F) -> F:
    """A helper whose code becomes part of its one caller before anything is compiled.

    LLVM optimises a helper by itself and then once more in each function above it. For a long one that is called from
    one place, the first is a waste of time.
    """
    return _helper(inline="always")(function)


def _helper(**options: Any) -> Callable[[F], F]:
    return numba.njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, **options)


@helper
def number(value: int) -> int:
    """``value`` as a variable: for a literal, numba would compile another version of each function that takes it."""
    return value + 0


# numpy's functions that make arrays are each compiled anew for each data type, each way to write the call, and for
# kernels and helpers apart. So what kernels allocate comes from here, wherever one of these will do.


def _zeros_of(dtype: type[np.generic]) -> Callable[[int], np.ndarray]:
    @helper
    def zeros(size: int) -> np.ndarray:
        array = np.empty(size, dtype=dtype)
        for i in range(size):
            array[i] = 0
        return array

    return zeros


zeros = _zeros_of(np.float64)
"""(size,) float64 zeros."""
int_zeros = _zeros_of(np.int64)
"""(size,) int64 zeros."""
int32_zeros = _zeros_of(np.int32)
"""(size,) int32 zeros."""


@helper
def int32_empty_table(rows: int, columns: int) -> np.ndarray:
    """(rows, columns) int32, whatever lies there."""
    return np.empty((rows, columns), dtype=np.int32)


@helper
def int32_table(rows: int, columns: int, value: int) -> np.ndarray:
    """(rows, columns) int32, each ``value``."""
    array = int32_empty_table(rows, columns)
    for i in range(rows):
        for j in range(columns):
            array[i, j] = value
    return array


@contextmanager
def for_short_loops() -> Iterator[None]:
    """Kernels compiled inside take 10 to 15% less time, and those of planners run 5 to 10% faster.

    For loops that are too short, or go too irregular ways, to become vector instructions: what looks for such loops
    does not run. What looks for like operations side by side does, as on the four scenarios of a search, which numba
    leaves out unless asked. Neither makes a difference to what kernels compute.
    """
    before = numba.config.LOOP_VECTORIZE, numba.config.SLP_VECTORIZE
    numba.config.LOOP_VECTORIZE, numba.config.SLP_VECTORIZE = 0, 1
    try:
        yield
    finally:
        numba.config.LOOP_VECTORIZE, numba.config.SLP_VECTORIZE = before


def compile_common_helpers() -> None:
    """Compiles what nearly every kernel calls, and has numba load what it knows of numpy: once, before a fork."""
    helpers: tuple[Any, ...] = (number, zeros, int_zeros)
    for each in helpers:
        each.compile((numba.int64,))
