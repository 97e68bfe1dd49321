"""Compiles every kernel that a rebalance needs, before anybody waits for one.

As a program: what a first plan needs where tokens are dispatched in the way that is named (``weights``, ``even``,
``batch``), a word that it is there, then the rest; all of it in silence without a name.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import cast

from equipoise.algorithms import warm_up as solver_kernels
from equipoise.algorithms.problem import DISPATCH_KINDS, DispatchKind
from equipoise.errors import ConfigError
from equipoise.jit.warming import WarmUp, compile_side_by_side, say_ready, warm_up_in_background

logger = logging.getLogger("equipoise.manager")


def _compile_transfer() -> None:
    """Compiles, or loads from numba's cache, what carrying out a rebalance needs."""
    from equipoise.transfer.execution.warm_up import compile_transfer  # here: the solvers' shares do not wait for torch

    compile_transfer()


def _first_shares(dispatch: DispatchKind) -> tuple[solver_kernels.Share, ...]:
    """What a first rebalance needs; the last share of planning and moving have helpers in common."""
    *shares, last = solver_kernels.first_shares(dispatch)

    def compile_last_and_transfer() -> None:
        last()
        _compile_transfer()

    return (*shares, compile_last_and_transfer)


def compile_first_kernels(dispatch: DispatchKind) -> None:
    """Compiles, or loads from numba's cache, what a first rebalance needs, in this process."""
    for share in _first_shares(dispatch):
        share()


def compile_kernels() -> None:
    """The same of all that any rebalance needs."""
    solver_kernels.warm_up()
    _compile_transfer()


def compile_kernels_in_background(dispatch: DispatchKind) -> WarmUp:
    """Has a child process compile them, at once and beside whatever this one does; first what a first plan needs."""
    return warm_up_in_background("equipoise.manager.warm_up", dispatch)


def load_compiled_kernels(compiling: WarmUp, dispatch: DispatchKind) -> None:
    """Waits until the child is ready and loads what a first plan needs; nothing if it failed: a plan compiles that.

    For the thread that plans, not for one that serves.
    """
    start = time.perf_counter()
    if compiling.wait_until_ready():
        compile_first_kernels(dispatch)
        logger.info("kernels of planning and transfer are ready after %.1f s", time.perf_counter() - start)
    elif not compiling.cancelled:
        logger.warning(
            "compiling kernels ahead failed: the first rebalance compiles, and takes as much longer: %s",
            compiling.complaint(),
        )


def _main(named: DispatchKind | None = None) -> int:
    dispatch: DispatchKind = named or "weights"
    if dispatch not in DISPATCH_KINDS:
        raise ConfigError(f"dispatch must be one of {', '.join(DISPATCH_KINDS)}, got {dispatch!r}", field="dispatch")
    first = compile_side_by_side(_first_shares(dispatch))
    if first and named:
        say_ready()
    others = compile_side_by_side(solver_kernels.other_shares(dispatch))
    return 0 if first and others else 1


if __name__ == "__main__":
    sys.exit(_main(*cast(list[DispatchKind], sys.argv[1:])))
