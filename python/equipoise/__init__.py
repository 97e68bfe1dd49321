"""Equipoise: keeps the experts of a Mixture-of-Experts model evenly loaded over the ranks that serve it.

The words, on one worked number. DeepSeek-V3 has ``L = 58`` MoE layers of ``E = 256`` *logical experts*. With
``R = 32`` *redundant experts* a layer has ``P = E + R = 288`` *physical experts* (*slots*). On ``G = 32`` *ranks*
in ``N = 4`` *nodes* a rank owns ``S = P / G = 9`` consecutive slots.

Names are imported on first use, so that ``equipoise --help`` does not pay for torch or numba.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from equipoise.algorithms.rebalance import rebalance_experts
    from equipoise.algorithms.registry import available_algorithms
    from equipoise.load.trace import LoadTrace
    from equipoise.placement.balancedness import balancedness
    from equipoise.placement.metadata import ExpertLocationMetadata
    from equipoise.topology import EpTopology
    from equipoise.transfer.planning.plan import TransferPlan, plan_transfer

__version__ = "0.1.0"

_HOME_OF_NAME = {
    "EpTopology": "equipoise.topology",
    "ExpertLocationMetadata": "equipoise.placement.metadata",
    "LoadTrace": "equipoise.load.trace",
    "TransferPlan": "equipoise.transfer.planning.plan",
    "available_algorithms": "equipoise.algorithms.registry",
    "balancedness": "equipoise.placement.balancedness",
    "plan_transfer": "equipoise.transfer.planning.plan",
    "rebalance_experts": "equipoise.algorithms.rebalance",
}

__all__ = [
    "EpTopology",
    "ExpertLocationMetadata",
    "LoadTrace",
    "TransferPlan",
    "available_algorithms",
    "balancedness",
    "plan_transfer",
    "rebalance_experts",
]


def __getattr__(name: str) -> object:
    if name in _HOME_OF_NAME:
        return getattr(import_module(_HOME_OF_NAME[name]), name)
    raise AttributeError(f"module 'equipoise' has no attribute {name!r}")
