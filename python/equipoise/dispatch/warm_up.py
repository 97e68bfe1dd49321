"""Compiles the kernels of dispatch by the batch into numba's cache, as a program: ``make kernels`` runs it."""

from __future__ import annotations

import torch

from equipoise.dispatch.dispatcher import ExpertDispatcher
from equipoise.dispatch.policy import DispatchPolicy
from equipoise.jit.compile import without_loop_vectors
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology


@without_loop_vectors()
def compile_dispatch() -> None:
    """Compiles what a batch of int64 ids needs; some seconds the first time."""
    metadata = ExpertLocationMetadata.trivial(1, 4, EpTopology(2, 1, 3))
    dispatcher = ExpertDispatcher(metadata, rank=0, policy=DispatchPolicy("batch"))
    dispatcher.dispatch(0, torch.zeros(1, 1, dtype=torch.int64))


if __name__ == "__main__":
    compile_dispatch()
