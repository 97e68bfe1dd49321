"""Runs a numba kernel over the layers of a problem, on one thread or several, with one and the same result."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def for_each_layer(kernel: Callable[..., None], num_layers: int, num_threads: int, *args: Any) -> None:
    """Calls ``kernel(layer, *args)`` for every layer.

    A kernel solves each layer on its own and writes only that layer's row of its output arrays, so the split over
    threads cannot change the result. It must release the GIL (``nogil=True``). Plain threads rather than numba's
    ``parallel=True``: its threading layer costs seconds of compilation and does not survive a fork.
    """
    workers = min(num_threads, num_layers)
    if workers <= 1:
        for layer in range(num_layers):
            kernel(layer, *args)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="equipoise-plan") as pool:
        running = [pool.submit(kernel, layer, *args) for layer in range(num_layers)]
        for future in running:
            future.result()
