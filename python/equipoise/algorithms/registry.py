"""Registers placement algorithms, the package's own and those of others: one frozen record each.

The package's own are a line each in :data:`OWN`. One of another package is a function under the decorator
:func:`register`, in a module that is imported by hand, or named by an entry point, which every process finds::

    [project.entry-points."equipoise.algorithms"]
    mine = "my_package.placement"
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points

from equipoise.algorithms import deepseek, priced_search, reweight
from equipoise.algorithms.problem import DISPATCH_KINDS, DispatchKind, PlacementProblem, Solution
from equipoise.errors import ConfigError

ENTRY_POINTS = "equipoise.algorithms"
HISTORY = 8  # windows that tell drift, shifts and mixtures apart, see window_weights.py; more add little
AUTO = "equipoise"

Solver = Callable[[PlacementProblem], Solution]
_log = logging.getLogger("equipoise.algorithms")


@dataclass(frozen=True)
class Algorithm:
    """A placement algorithm and what sets it apart.

    Attributes:
        name: what the command line, the server and the replay call it.
        solve: from a checked problem to a solution; pure.
        by_nodes: it assigns experts to nodes first, even where the model names no groups. What it keeps together on a
            node must stay together: ranks may not be renamed across nodes.
        groups: it keeps the expert groups of ``num_groups`` whole on nodes.
        history: past windows that it is best given. The published planners add up what they get, and look at one.
        dispatch: kinds of dispatch that a plan of it makes sense for.
        rank_capacity: it honours ranks that are slower than others, or gone.
    """

    name: str
    solve: Solver
    by_nodes: bool = False
    groups: bool = True
    history: int = HISTORY
    dispatch: tuple[DispatchKind, ...] = DISPATCH_KINDS
    rank_capacity: bool = True


OWN = (
    Algorithm("deepseek", deepseek.solve_global, groups=False, history=1, rank_capacity=False),
    Algorithm("deepseek_hierarchical", deepseek.solve_hierarchical, by_nodes=True, history=1, rank_capacity=False),
    Algorithm("equipoise", priced_search.solve),
    Algorithm("reweight", reweight.solve, dispatch=("weights",)),
)
_known = {algorithm.name: algorithm for algorithm in OWN}


def register(
    name: str,
    *,
    by_nodes: bool = False,
    groups: bool = False,
    history: int = HISTORY,
    dispatch: tuple[DispatchKind, ...] = DISPATCH_KINDS,
    rank_capacity: bool = False,
) -> Callable[[Solver], Solver]:
    """Decorates a function from problem to solution, and registers it; arguments as in :class:`Algorithm`.

    In this process alone: an engine's ranks are processes of their own, and find an algorithm by its entry point.

    Raises:
        ConfigError: another function has that name already, or the name is ``auto``.
    """

    def decorate(solve: Solver) -> Solver:
        algorithm = Algorithm(name, solve, by_nodes, groups, history, dispatch, rank_capacity)
        known = _known.setdefault(name, algorithm)
        if name == "auto" or known.solve is not solve:
            raise ConfigError(f"an algorithm named {name!r} is registered already", field="algorithm")
        return solve

    return decorate


@cache
def _load_entry_points() -> None:
    """Imports what installed packages offer, once; a package that fails is named in the log and left out."""
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:  # a stranger's module may raise anything
            _log.warning("algorithms of entry point %s = %s left out: %s", entry.name, entry.value, error)


def available_algorithms() -> list[str]:
    """Names that :func:`rebalance_experts` takes besides ``auto``, sorted."""
    _load_entry_points()
    return sorted(_known)


def check_algorithm(name: str, *, field: str = "algorithm", dispatch: DispatchKind | None = None) -> None:
    """
    Raises:
        ConfigError: ``name`` is neither ``auto`` nor one of :func:`available_algorithms`; the message lists them. Or
            its plans make no sense for ``dispatch``.
    """
    if name != "auto" and name not in available_algorithms():
        known = ", ".join(["auto", *available_algorithms()])
        raise ConfigError(f"{field} must be one of {known}, got {name!r}", field=field)
    kinds = _known[AUTO if name == "auto" else name].dispatch
    if dispatch is not None and dispatch not in kinds:
        raise ConfigError(
            f"{field} {name} plans for dispatch {', '.join(kinds)}, got dispatch={dispatch!r}", field=field
        )


def find_algorithm(name: str) -> Algorithm:
    """The record of an algorithm; that of the default one for ``auto``.

    Raises:
        ConfigError: as :func:`check_algorithm`.
    """
    check_algorithm(name)
    return _known[AUTO] if name == "auto" else _known[name]
