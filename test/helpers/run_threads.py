"""Runs a function on several ranks, each a thread of this process with an in-memory communicator.

The communicator checks that all ranks call the same collectives; see lockstep.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from equipoise.distributed.communicator import Communicator
from equipoise.distributed.in_memory import InMemoryHub
from helpers.lockstep import LockstepCommunicator


def run_threads(fn: Callable[[Communicator], Any], world_size: int, timeout: float = 60.0) -> list[Any]:
    """Calls ``fn(communicator)`` per rank; returns results by rank, an exception where a rank raised one."""
    results: list[Any] = [TimeoutError("did not finish")] * world_size

    def body(communicator: Communicator) -> None:
        try:
            results[communicator.rank] = fn(communicator)
        except BaseException as error:
            results[communicator.rank] = error

    threads = [
        threading.Thread(target=body, args=(LockstepCommunicator(each),), daemon=True)
        for each in InMemoryHub(world_size).communicators()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
    return results


def results_of(fn: Callable[[Communicator], Any], world_size: int, timeout: float = 60.0) -> list[Any]:
    """As :func:`run_threads`, but raises the first rank's exception if there is one."""
    results = run_threads(fn, world_size, timeout)
    for rank, result in enumerate(results):
        if isinstance(result, BaseException):
            raise AssertionError(f"rank {rank} raised {type(result).__name__}: {result}") from result
    return results
