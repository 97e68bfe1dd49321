"""Compiles kernels in the background, before anybody waits for a plan.

The first plan on a fresh installation compiles for some seconds; afterwards the kernels are loaded from numba's cache
on disk. Compiling in the engine's own process would hold the GIL and delay steps, so a child process fills the cache.
The kernels come in shares that take about as long; the child forks, once it has imported what they all need, and they
are compiled side by side. One that compiles what a first plan needs ahead of the rest says so in between
(:func:`say_ready`), and whoever waits for that plan goes on.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO

from numba.core import event

from equipoise.jit.compile import compile_common_helpers

_TAIL_LINES, _TAIL_BYTES = 12, 4096  # of what a child wrote, for a log
_READY = b"ready\n"
_POLL_SECONDS = 0.02  # between two looks at whether the child is ready, each a call or two of the system
# Of a process from its first kernel on that is in no cache; three processes at 10 weigh as much as one at 5. Imports
# and loading are short and keep their priority: at 10, on a busy machine, they alone would take a minute.
_NICE = 10
# The child's standard input is a pipe that its parent never writes to: it ends when the parent does, however that was.
_COMPILE = """
import os, runpy, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
runpy.run_module({module!r}, run_name="__main__")
"""


@dataclass(frozen=True)
class WarmUp:
    """A compilation under way in a child process.

    Attributes:
        said: what the child and those that it forked have written to their standard error; None: it went elsewhere.
        told: the same of their standard output.
    """

    process: subprocess.Popen[bytes]
    said: IO[bytes] | None = None
    told: IO[bytes] | None = None
    _cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def done(self) -> bool:
        return self.process.poll() is not None

    @property
    def ready(self) -> bool:
        """Whether what a first plan needs lies in the cache; the child may go on with the rest."""
        if self.told is not None and os.pread(self.told.fileno(), len(_READY), 0) == _READY:
            return True
        return self.process.poll() == 0

    def wait_until_ready(self) -> bool:
        """Waits until :attr:`ready`; False if the child ended without.

        Call it on the thread that plans, before the first plan: planning then loads the kernels instead of compiling
        them beside the forward passes. False is no failure: that plan compiles what it needs.
        """
        while not self.done and not self.ready:
            time.sleep(_POLL_SECONDS)
        return self.ready

    def wait(self, timeout: float | None = None) -> bool:
        """Waits up to ``timeout`` seconds, for ever if None, for the child's end; True if the cache is filled."""
        try:
            return self.process.wait(timeout) == 0
        except subprocess.TimeoutExpired:
            return False

    @property
    def cancelled(self) -> bool:
        """Whether it was ended from here: no failure, and nobody waits for its kernels any more."""
        return self._cancelled.is_set()

    def complaint(self) -> str:
        """How a child that failed ended, and the last lines that it wrote; for a log."""
        ended = f"exit status {self.process.poll()}"
        if self.said is None:
            return ended
        written = os.pread(self.said.fileno(), _TAIL_BYTES, max(0, os.fstat(self.said.fileno()).st_size - _TAIL_BYTES))
        lines = written.decode(errors="replace").splitlines()[-_TAIL_LINES:]
        return "\n  ".join([ended, *lines])

    def cancel(self) -> None:
        """Ends the child process, and those that it has forked; a shutdown does not wait for a compiler."""
        self._cancelled.set()
        self.process.kill()
        self.process.communicate()


def warm_up_in_background(module: str = "equipoise.algorithms.warm_up", *arguments: str) -> WarmUp:
    """Starts compiling all kernels into numba's cache, in a child process, and returns at once.

    ``module`` is run as a program, with ``arguments``; a host that has more kernels than the solvers' names its own.
    Where the cache is filled already the child ends within a second or two, most of it spent on imports. It never
    outlives this process, and imports nothing that happens to lie in the current directory (-P).
    """
    told = tempfile.TemporaryFile()  # noqa: SIM115 not pipes: nobody reads while it compiles
    said = tempfile.TemporaryFile()  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _COMPILE.format(module=module), *arguments],
        stdin=subprocess.PIPE,
        stdout=told,
        stderr=said,
    )
    return WarmUp(process, said, told)


def say_ready() -> None:
    """Tells whoever started this process in the background that its first plan need not wait any longer."""
    os.write(sys.stdout.fileno(), _READY)


def compile_side_by_side(shares: Sequence[Callable[[], None]]) -> bool:
    """Calls each of ``shares`` in a process forked from this one; True if none of them failed.

    A share that compiles goes on at low priority. They end when this process does. Call it in a process made for that:
    what other threads hold stays locked in the forked ones for ever.
    """
    compile_common_helpers()
    watched, held = os.pipe()  # closed on this side when this process ends, however that was
    children = []
    for share in shares:
        child = os.fork()
        if child == 0:
            os.close(held)
            threading.Thread(target=_compile_and_exit, args=(share,), daemon=True).start()
            os.read(watched, 1)  # returns when the parent is gone
            os._exit(1)
        children.append(child)
    failed = [child for child in children if os.waitpid(child, 0)[1] != 0]
    os.close(watched)
    os.close(held)
    return not failed


class _LowerPriority(event.Listener):
    """Lowers this process's priority when a kernel is compiled, not when one is loaded from the cache."""

    def __init__(self) -> None:
        self._lowered = False

    def on_start(self, _event: event.Event) -> None:
        if not self._lowered:
            os.nice(_NICE)
            self._lowered = True

    def on_end(self, _event: event.Event) -> None:
        pass


def _compile_and_exit(share: Callable[[], None]) -> None:
    gc.disable()  # a compiler keeps most of what it makes: looking for garbage costs 10 to 20%
    event.register("numba:compile", _LowerPriority())
    try:
        share()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
