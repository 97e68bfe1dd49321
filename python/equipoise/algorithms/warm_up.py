"""Compiles the solvers' kernels: in shares, as a program of its own, or all in this process.

Nothing here imports torch, whose import would take as long as a fifth of the kernels.
"""

from __future__ import annotations

import sys

import numpy as np

from equipoise.algorithms import priced_search
from equipoise.algorithms.problem import DEFAULT_MOVE_PRICE, PlacementProblem
from equipoise.algorithms.registry import OWN
from equipoise.jit.compile import for_short_loops
from equipoise.jit.warming import compile_side_by_side
from equipoise.topology import EpTopology


@for_short_loops()
def compile_search() -> None:
    """Compiles, or loads from the cache, the search of the default algorithm: half of the solvers' kernels."""
    priced_search.compile_search(_small_problem())


@for_short_loops()
def compile_all_but_search() -> None:
    """Compiles, or loads from the cache, the solvers' other kernels."""
    problem = _small_problem()
    for algorithm in OWN:
        if algorithm.solve is not priced_search.solve:
            algorithm.solve(problem)
    priced_search.compile_packing(problem)


SHARES = (compile_search, compile_all_but_search)


def warm_up() -> None:
    """Compiles, or loads from the cache, every kernel; some 12 s the first time, less than half a second later."""
    for share in SHARES:
        share()


def _small_problem() -> PlacementProblem:
    return PlacementProblem(
        load=np.arange(1.0, 17.0).reshape(2, 1, 8),
        topology=EpTopology(4, 2, 3),
        current=None,
        num_groups=None,
        max_moves_per_layer=None,
        rank_capacity=None,
        move_price=DEFAULT_MOVE_PRICE,
        num_threads=1,
    )


if __name__ == "__main__":
    sys.exit(0 if compile_side_by_side(SHARES) else 1)
