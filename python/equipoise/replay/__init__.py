"""Offline replay: recorded load played against a placement algorithm."""

from equipoise.replay.policy import AlgorithmPolicy, Policy
from equipoise.replay.result import ReplayResult
from equipoise.replay.simulate import replay

__all__ = ["AlgorithmPolicy", "Policy", "ReplayResult", "replay"]
