"""Compiles the solvers' kernels before anybody waits for a plan.

The first plan on a fresh installation compiles for some seconds; afterwards the kernels are loaded from numba's cache
on disk. Compiling in the engine's own process would hold the GIL and delay steps, so a child process fills the cache.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import numpy as np

# The child's standard input is a pipe that its parent never writes to: it ends when the parent does, however that was.
_COMPILE = """
import os, runpy, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
os.nice(5)
runpy.run_module({module!r}, run_name="__main__")
"""


@dataclass(frozen=True)
class WarmUp:
    """A compilation under way in a child process."""

    process: subprocess.Popen[bytes]

    @property
    def done(self) -> bool:
        return self.process.poll() is not None

    def wait(self, timeout: float | None = None) -> bool:
        """Waits up to ``timeout`` seconds, for ever if None; True if the cache is filled.

        Call it on the thread that plans, before the first plan: planning then loads the kernels instead of compiling
        them beside the forward passes. False is no failure: that plan compiles what it needs.
        """
        try:
            return self.process.wait(timeout) == 0
        except subprocess.TimeoutExpired:
            return False

    def cancel(self) -> None:
        """Ends the child process; a shutdown does not wait for a compiler."""
        self.process.kill()
        self.process.communicate()


def warm_up_in_background(module: str = "equipoise.algorithms.warming") -> WarmUp:
    """Starts compiling all kernels into numba's cache, in a child process of low priority, and returns at once.

    ``module`` is run as a program; a host that has more kernels than the solvers' names its own. Where the
    cache is filled already the child ends within a second or two, most of it spent on imports. It never outlives
    this process, and imports nothing that happens to lie in the current directory (-P).
    """
    return WarmUp(
        subprocess.Popen(
            [sys.executable, "-P", "-c", _COMPILE.format(module=module)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    )


def warm_up() -> None:
    """Compiles, or loads from the cache, every kernel; some 15 s the first time, about half a second later."""
    from equipoise.algorithms.registry import available_algorithms, rebalance_experts
    from equipoise.topology import EpTopology

    load = np.arange(1.0, 17.0).reshape(2, 1, 8)
    for algorithm in available_algorithms():
        rebalance_experts(load, EpTopology(4, 2, 3), algorithm=algorithm, num_threads=1)


if __name__ == "__main__":
    warm_up()
