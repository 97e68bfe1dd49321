"""Arrays that a kernel finds by their address, for kernels that are called for each layer of each step.

Handed an array, numba takes it apart in a microsecond, and torch makes a view of a tensor in one to three; between the
products of a forward pass, which have filled the caches, both take five times as long: more than the work on a small
batch. Integers cost nothing. Nor do they check anything: who calls such a kernel answers for the shape, dtype and order
of what lies there, and holds a reference to it meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba.extending import intrinsic

from equipoise.jit.compile import helper


def _pointer_to(item: Any) -> Callable[[int], Any]:
    pointer = numba.types.CPointer(item)

    @intrinsic
    def cast(_context, address):  # type: ignore[no-untyped-def] # noqa: ARG001 (numba reads the name)
        def generate(context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
            return builder.inttoptr(arguments[0], context.get_value_type(pointer))

        return pointer(numba.types.int64), generate

    return cast


_int32_pointer, _int64_pointer, _float32_pointer = (
    _pointer_to(item) for item in (numba.int32, numba.int64, numba.float32)
)


@helper
def int32_at(address: int, shape: tuple[int, ...]) -> np.ndarray:
    """The int32 array of this shape, in C order, that begins at ``address``."""
    return numba.carray(_int32_pointer(address), shape)


@helper
def int64_at(address: int, shape: tuple[int, ...]) -> np.ndarray:
    """The int64 array of this shape, in C order, that begins at ``address``."""
    return numba.carray(_int64_pointer(address), shape)


@helper
def float32_at(address: int, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 array of this shape, in C order, that begins at ``address``."""
    return numba.carray(_float32_pointer(address), shape)
