"""Compiles the kernels of a step into numba's cache, as a program: ``make kernels`` runs it."""

from __future__ import annotations

from typing import get_args

import torch

from equipoise.config import DispatchAlgorithm
from equipoise.dispatch.dispatcher import ExpertDispatcher
from equipoise.dispatch.policy import DispatchPolicy
from equipoise.jit.compile import for_short_loops
from equipoise.load.step_fold import StepFold
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology


@for_short_loops()
def compile_dispatch() -> None:
    """Compiles those of dispatch and of recording; some seconds the first time."""
    metadata = ExpertLocationMetadata.trivial(1, 4, EpTopology(2, 1, 3))
    for algorithm in get_args(DispatchAlgorithm):
        dispatcher = ExpertDispatcher(metadata, rank=0, policy=DispatchPolicy(algorithm))
        dispatcher.dispatch(0, torch.zeros(1, 1, dtype=torch.int64))
    StepFold(torch.zeros(1, 2, dtype=torch.int32))  # compiles as it is made


if __name__ == "__main__":
    compile_dispatch()
