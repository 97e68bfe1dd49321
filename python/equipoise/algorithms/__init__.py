"""Placement algorithms: one solver per file, one registry, one conformance suite that all of them pass.

A new algorithm is a function from :class:`~equipoise.algorithms.problem.PlacementProblem` to
:class:`~equipoise.algorithms.problem.Placement` and a line in ``registry.py``.
"""

from typing import TYPE_CHECKING

from equipoise.algorithms.problem import DEFAULT_MOVE_PRICE
from equipoise.algorithms.registry import HISTORY, available_algorithms, check_algorithm, history_of, plans_by_nodes
from equipoise.algorithms.warming import WarmUp, warm_up_in_background

if TYPE_CHECKING:
    from equipoise.algorithms.rebalance import rebalance_experts
    from equipoise.algorithms.solver_kernels import warm_up

__all__ = [
    "DEFAULT_MOVE_PRICE",
    "HISTORY",
    "WarmUp",
    "available_algorithms",
    "check_algorithm",
    "history_of",
    "plans_by_nodes",
    "rebalance_experts",
    "warm_up",
    "warm_up_in_background",
]


def __getattr__(name: str) -> object:
    """Loads on first use what needs torch, and what is a program of its own: compiling the solvers needs no torch."""
    if name == "rebalance_experts":
        from equipoise.algorithms.rebalance import rebalance_experts

        return rebalance_experts
    if name == "warm_up":
        from equipoise.algorithms.solver_kernels import warm_up

        return warm_up
    raise AttributeError(f"module 'equipoise.algorithms' has no attribute {name!r}")
