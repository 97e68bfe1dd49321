"""Compiles every kernel that a rebalance needs, before anybody waits for one."""

from __future__ import annotations

import logging
import sys
import time

from equipoise.algorithms import warm_up as solver_kernels
from equipoise.jit.warming import WarmUp, compile_side_by_side, warm_up_in_background

logger = logging.getLogger("equipoise.manager")


def _compile_transfer() -> None:
    """Compiles, or loads from numba's cache, what carrying out a rebalance needs."""
    from equipoise.transfer.execution.warm_up import compile_transfer  # here: the solvers' shares do not wait for torch

    compile_transfer()


SHARES = (*solver_kernels.SHARES, _compile_transfer)


def compile_kernels() -> None:
    """Compiles, or loads from numba's cache, what planning and carrying out a rebalance needs, in this process."""
    for share in SHARES:
        share()


def compile_kernels_in_background() -> WarmUp:
    """Has a child process compile them, at once and beside whatever this one does."""
    return warm_up_in_background("equipoise.manager.warm_up")


def load_compiled_kernels(compiling: WarmUp) -> None:
    """Waits for the child and loads what it has compiled; nothing if it failed: a plan compiles what it needs.

    For the thread that plans, not for one that serves.
    """
    start = time.perf_counter()
    if compiling.wait():
        compile_kernels()
        logger.info("kernels of planning and transfer are ready after %.1f s", time.perf_counter() - start)
    elif not compiling.cancelled:
        logger.warning(
            "compiling kernels ahead failed: the first rebalance compiles, and takes as much longer: %s",
            compiling.complaint(),
        )


if __name__ == "__main__":
    sys.exit(0 if compile_side_by_side(SHARES) else 1)
