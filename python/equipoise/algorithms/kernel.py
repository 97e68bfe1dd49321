"""How the solvers' inner loops are compiled: one decorator, so that they all round, divide and cache alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Compiles a function that Python calls: cached on disk, without the GIL.

    No ``fastmath``: sums keep their order, so a plan is the same on any machine. Division by zero gives infinity, as
    in numpy; a branch that raises would cost more than the division.

    numba keys its cache by the file of the function alone. After editing a helper in another file, delete
    ``__pycache__`` next to the callers.
    """
    return numba.njit(cache=True, nogil=True, error_model="numpy")(function)


def helper(function: F) -> F:
    """Compiles a function that only kernels call, into them.

    It has no wrappers for Python and no cache of its own: a cached kernel holds all that it calls.
    """
    return numba.njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


@helper
def number(value: int) -> int:
    """``value`` as a variable: for a literal, numba would compile another version of each function that takes it."""
    return value + 0
