"""Small cases that other planners publish with their own results, for dispatch that splits evenly.

Sources: FlashLB's example (vllm-ascend, pull request 3042), and the unit tests of FlashLB and SwiftBalancer (vLLM, pull
requests 24069 and 37656). Loads and results are theirs; each result is the placement that the test expects.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from equipoise.algorithms.rebalance import rebalance_experts
from equipoise.placement.balancedness import balancedness
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology


class Published(NamedTuple):
    """A case and the peak-to-average ratio (PAR) that is published for it, a layer each."""

    load: np.ndarray  # (L, E)
    topology: EpTopology
    current: np.ndarray | None  # (L, P) the placement in force, if the case has one
    par: tuple[float, ...]


CASES = {
    "FlashLB's example": Published(
        np.array([[600, 560, 120, 120, 20, 10, 10, 10]]), EpTopology(8, 1, 2), None, (205 / 181.25,)
    ),
    "FlashLB's test": Published(
        np.array(
            [
                [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
                [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
            ]
        ),
        EpTopology(8, 1, 2),
        None,
        (1.0727, 1.1904),
    ),
    "SwiftBalancer's test": Published(
        np.array(
            [
                [29, 11, 41, 27, 19, 37, 21, 33, 13, 25, 39, 7, 15, 43, 47, 53],
                [25, 30, 12, 18, 22, 28, 32, 8, 14, 26, 38, 40, 42, 45, 50, 100],
            ]
        ),
        EpTopology(4, 1, 5),
        np.array(
            [
                [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 12, 13, 14, 15, 0],
                [0, 1, 2, 3, 6, 4, 5, 6, 7, 9, 8, 9, 10, 11, 6, 12, 13, 14, 15, 6],
            ]
        ),
        (1.0391, 1.2478),
    ),
}


def published_cases() -> dict[str, dict[str, float]]:
    """Mean PAR over a case's layers: of `even`, of the published planner, and as published for the case."""
    rows = {}
    for name, case in CASES.items():
        load, current = case.load.astype(np.float64), None
        if case.current is not None:
            current = ExpertLocationMetadata.from_physical_to_logical(case.current, load.shape[1], case.topology)
        plan = rebalance_experts(load, case.topology, current=current, dispatch="even")
        deepseek = rebalance_experts(load, case.topology, algorithm="deepseek")
        rows[name] = {
            "even": float((1.0 / balancedness(load, plan)).mean()),
            "deepseek": float((1.0 / balancedness(load, deepseek)).mean()),
            "as published": float(np.mean(case.par)),
        }
    return rows
