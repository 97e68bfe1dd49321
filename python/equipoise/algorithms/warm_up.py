"""Compiles the solvers' kernels: in shares, as a program of its own, or all in this process.

The first shares are what a plan of the default algorithm for a placement in force needs, where tokens are dispatched in
one way; a server's first plan waits for no other. Nothing here imports torch, whose import would take as long as a
fifth of the kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np

from equipoise.algorithms import priced_search
from equipoise.algorithms.problem import DEFAULT_MOVE_PRICE, DispatchKind, PlacementProblem
from equipoise.algorithms.registry import OWN
from equipoise.jit.compile import for_short_loops
from equipoise.jit.warming import compile_side_by_side
from equipoise.topology import EpTopology

Share = Callable[[], None]


@for_short_loops()
def compile_search() -> None:
    """Compiles, or loads from the cache, the search of the default algorithm, and what solves shares by themselves."""
    priced_search.compile_search(_small_problem())


@for_short_loops()
def compile_packing() -> None:
    """Compiles, or loads from the cache, what else a plan for a placement in force needs, whatever the dispatch."""
    priced_search.compile_packing(_small_problem())


@for_short_loops()
def compile_for_batches() -> None:
    """Compiles, or loads from the cache, what plans for dispatch by the batch need besides."""
    priced_search.compile_for_batches(_small_problem())


@for_short_loops()
def compile_others() -> None:
    """Compiles, or loads from the cache, the kernels of the other algorithms, and those for one window from nothing."""
    problem = _small_problem(num_windows=1)
    for algorithm in OWN:
        if algorithm.solve is not priced_search.solve:
            algorithm.solve(problem)


def first_shares(dispatch: DispatchKind) -> tuple[Share, ...]:
    """What a plan for a placement in force needs; a host's kernels go well with the last of them."""
    shares = (compile_search, compile_packing)
    return (compile_for_batches, *shares) if dispatch == "batch" else shares


def other_shares(dispatch: DispatchKind) -> tuple[Share, ...]:
    """What :func:`first_shares` leaves out; to be compiled after them, with which they have kernels in common."""
    return (compile_others,) if dispatch == "batch" else (compile_others, compile_for_batches)


def warm_up() -> None:
    """Compiles, or loads from the cache, every kernel; about a minute the first time, half a second later."""
    for share in (*first_shares("batch"), *other_shares("batch")):
        share()


def _small_problem(num_windows: int = 2) -> PlacementProblem:
    return PlacementProblem(
        load=np.arange(1.0, 17.0).reshape(2, 1, 8)[:num_windows],
        topology=EpTopology(4, 2, 3),
        current=None,
        num_groups=None,
        max_moves_per_layer=None,
        rank_capacity=None,
        move_price=DEFAULT_MOVE_PRICE,
        num_threads=1,
    )


if __name__ == "__main__":
    first, others = (compile_side_by_side(shares("batch")) for shares in (first_shares, other_shares))
    sys.exit(0 if first and others else 1)
