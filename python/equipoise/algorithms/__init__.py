"""Placement algorithms: one solver per file, one registry, one conformance suite that all of them pass.

A new algorithm is a function from :class:`~equipoise.algorithms.problem.PlacementProblem` to
:class:`~equipoise.algorithms.problem.Placement` and a line in ``registry.py``.
"""

from equipoise.algorithms.registry import (
    DEFAULT_MOVE_PRICE,
    available_algorithms,
    check_algorithm,
    plans_by_nodes,
    rebalance_experts,
)
from equipoise.algorithms.warming import WarmUp, warm_up, warm_up_in_background

__all__ = [
    "DEFAULT_MOVE_PRICE",
    "WarmUp",
    "available_algorithms",
    "check_algorithm",
    "plans_by_nodes",
    "rebalance_experts",
    "warm_up",
    "warm_up_in_background",
]
