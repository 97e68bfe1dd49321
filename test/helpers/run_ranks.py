"""Runs a function on several ranks, each a process of its own with a gloo group over all of them."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

# Imported once, for all ranks of all tests.
PRELOADED = ["torch.distributed", "equipoise.manager.manager", "equipoise.engine.model.runner"]
GRACE_SECONDS = 3.0  # for the tracebacks of the other ranks once one has failed


class RanksFailed(AssertionError):
    """One or more ranks raised, died or did not finish in time; the message holds every rank's traceback."""


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    group_timeout: float = 60.0,
    may_die: tuple[int, ...] = (),
) -> list[Any]:
    """Calls ``fn(rank, world_size, *args)`` in ``world_size`` processes and returns what they returned, by rank.

    ``fn`` is a function at the top level of a module. The default process group (gloo, loopback) exists when it is
    called; its store listens on a port that the system chose. torch and OpenMP use one thread. Ranks listed in
    ``may_die`` may end without a word: their result is None. No process outlives the call.
    """
    ranks = _Ranks(fn, world_size, group_timeout, args)
    try:
        ranks.wait(time.monotonic() + timeout)
    finally:
        ranks.end()
    failures = ranks.failures(may_die, timeout)
    if failures:
        raise RanksFailed("\n".join(failures))
    return ranks.results


class _Ranks:
    """The processes of one call.

    Attributes:
        results: what each rank returned, or its traceback; None of a rank that said nothing.
    """

    def __init__(self, fn: Callable[..., Any], world_size: int, group_timeout: float, args: tuple[Any, ...]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        self._pipes: list[multiprocessing.connection.Connection] = []
        self._processes = []
        self._ended: dict[int, str] = {}
        self.results: list[Any] = [None] * world_size
        for rank in range(world_size):
            mine, theirs = context.Pipe()
            given = (fn, rank, world_size, self._store.port, group_timeout, theirs, args)
            process = context.Process(target=_run_rank, args=given, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(mine)

    def wait(self, deadline: float) -> None:
        """Receives of every rank, until all have ended, the deadline, or a moment after the first that raised."""
        waiting = dict(enumerate(self._pipes))
        while waiting:
            ready = multiprocessing.connection.wait(waiting.values(), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
                try:
                    kind, value = waiting[rank].recv()
                except EOFError:
                    self._ended[rank] = "died"  # the others say what they make of that
                    del waiting[rank]
                    continue
                del waiting[rank]
                self._ended[rank] = kind
                self.results[rank] = value
                if kind == "raised":
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)

    def end(self) -> None:
        """Ends every process: those that have answered when all hung up, the others by force."""
        for pipe in self._pipes:
            pipe.close()  # a rank that has answered waits for this, so that nobody hangs up on the others
        for rank, process in enumerate(self._processes):
            if rank not in self._ended:
                process.terminate()  # writes its stack, see _run_rank
            process.join(GRACE_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()

    def failures(self, may_die: tuple[int, ...], timeout: float) -> list[str]:
        """Says what became of each rank that did not return."""
        said = []
        for rank, process in enumerate(self._processes):
            ended = self._ended.get(rank)
            if ended == "raised":
                said.append(f"rank {rank} raised\n{self.results[rank]}")
            elif ended == "died" and rank not in may_die:
                said.append(f"rank {rank} died without a result (exit code {process.exitcode})")
            elif ended is None and rank not in may_die:
                said.append(f"rank {rank} was killed: no result in {timeout:g} s or {GRACE_SECONDS:g} s after a fault")
        return said


def _run_rank(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    group_timeout: float,
    pipe: multiprocessing.connection.Connection,
    args: tuple[Any, ...],
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    faulthandler.register(signal.SIGTERM, chain=True)
    try:
        store = dist.TCPStore("127.0.0.1", port, None, False)
        limit = timedelta(seconds=group_timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
        dist.barrier()  # a rank that still connects fails when another, whose part is done, hangs up or dies
        pipe.send(("returned", fn(rank, world_size, *args)))
    except BaseException:
        pipe.send(("raised", traceback.format_exc()))
    finally:
        with contextlib.suppress(OSError):
            pipe.poll(None)  # until the parent hangs up: all ranks are done
        os._exit(0)  # skips the group's orderly end, which would wait for ranks that a test has killed
