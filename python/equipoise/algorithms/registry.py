"""The registry of placement algorithms: what each is called, and what sets it apart."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from equipoise.algorithms import deepseek, priced_search, reweight
from equipoise.algorithms.problem import PlacementProblem, Solution
from equipoise.errors import ConfigError

Solver = Callable[[PlacementProblem], Solution]

SOLVERS: MappingProxyType[str, Solver] = MappingProxyType(
    {
        "deepseek": deepseek.solve_global,
        "deepseek_hierarchical": deepseek.solve_hierarchical,
        "equipoise": priced_search.solve,
        "reweight": reweight.solve,
    }
)
_BY_NODES = frozenset({"deepseek_hierarchical"})
_BY_ONE_WINDOW = frozenset({"deepseek", "deepseek_hierarchical"})
HISTORY = 8  # windows that tell drift, shifts and mixtures apart, see window_weights.py; more add little


def plans_by_nodes(name: str) -> bool:
    """Whether an algorithm assigns experts to nodes first, even where the model names no groups.

    What it keeps together on a node must stay together: ranks may not be renamed across nodes.
    """
    return name in _BY_NODES


def history_of(name: str) -> int:
    """Past windows that an algorithm is best given: the published planners add up what they get, and look at one."""
    return 1 if name in _BY_ONE_WINDOW else HISTORY


def available_algorithms() -> list[str]:
    """Names that :func:`rebalance_experts` takes besides ``auto``, sorted."""
    return sorted(SOLVERS)


def check_algorithm(name: str, *, field: str = "algorithm") -> None:
    """
    Raises:
        ConfigError: ``name`` is neither ``auto`` nor one of :func:`available_algorithms`; the message lists them.
    """
    if name != "auto" and name not in SOLVERS:
        known = ", ".join(["auto", *available_algorithms()])
        raise ConfigError(f"{field} must be one of {known}, got {name!r}", field=field)


def solver(name: str) -> Solver:
    """
    Raises:
        ConfigError: as :func:`check_algorithm`.
    """
    check_algorithm(name)
    return SOLVERS["equipoise" if name == "auto" else name]
