"""Runs a function on several ranks, each a process of its own with a gloo group over all of them."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
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
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    processes, pipes = [], []
    for rank in range(world_size):
        mine, theirs = context.Pipe()
        process = context.Process(
            target=_run_rank, args=(fn, rank, world_size, store.port, group_timeout, theirs, args), daemon=True
        )
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(mine)
    outcomes: list[tuple[str, Any] | None] = [None] * world_size
    try:
        _collect(pipes, outcomes, time.monotonic() + timeout)
    finally:
        for pipe in pipes:
            pipe.close()  # a rank that has answered waits for this, so that nobody hangs up on the others
        for process, outcome in zip(processes, outcomes, strict=True):
            if outcome is None:
                process.kill()
            process.join(GRACE_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
    failures = []
    for rank, outcome in enumerate(outcomes):
        if outcome is None and rank not in may_die:
            code = processes[rank].exitcode
            failures.append(f"rank {rank} ended without a result (exit code {code}, timeout {timeout:g} s)")
        elif outcome is not None and outcome[0] == "error":
            failures.append(f"rank {rank} raised\n{outcome[1]}")
    if failures:
        raise RanksFailed("\n".join(failures))
    return [outcome[1] if outcome is not None else None for outcome in outcomes]


def _collect(
    pipes: list[multiprocessing.connection.Connection], outcomes: list[tuple[str, Any] | None], deadline: float
) -> None:
    waiting = {id(pipe): rank for rank, pipe in enumerate(pipes)}
    failed = False
    while waiting:
        open_pipes = [pipe for pipe in pipes if id(pipe) in waiting]
        ready = multiprocessing.connection.wait(open_pipes, max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            rank = waiting.pop(id(pipe))
            try:
                outcomes[rank] = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                continue  # it died; the others say what they make of that
            if outcomes[rank][0] == "error" and not failed:  # type: ignore[index]
                failed = True
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)


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
    try:
        store = dist.TCPStore("127.0.0.1", port, None, False)
        limit = timedelta(seconds=group_timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
        pipe.send(("result", fn(rank, world_size, *args)))
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
    finally:
        with contextlib.suppress(OSError):
            pipe.poll(None)  # until the parent hangs up: all ranks are done
        os._exit(0)  # skips the group's orderly end, which would wait for ranks that a test has killed
