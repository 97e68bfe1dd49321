"""Runs numba kernels over layers on several threads, with one and the same result; counts processors."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any


def available_cpus() -> int:
    """At least 1; honours the process's affinity where the system has such a thing (Linux)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def for_each_layer(kernel: Callable[..., None], num_layers: int, num_threads: int, *args: Any) -> None:
    """Calls ``kernel(first, last, *args)`` for ranges that cover the layers once.

    A kernel solves each layer on its own and writes only that layer's rows of its output arrays, so the split over
    threads cannot change the result. It must release the GIL (``nogil=True``). Plain threads rather than numba's
    ``parallel=True``: its threading layer costs seconds of compilation and does not survive a fork.
    """
    workers = min(num_threads, num_layers)
    if workers <= 1:
        kernel(0, num_layers, *args)
        return
    # More ranges than threads: layers differ in how long they search.
    num_ranges = min(num_layers, 4 * workers)
    edges = [num_layers * i // num_ranges for i in range(num_ranges + 1)]
    with ThreadPoolExecutor(workers, thread_name_prefix="equipoise-plan") as pool:
        running = [pool.submit(kernel, first, last, *args) for first, last in pairwise(edges)]
        for future in running:
            future.result()
