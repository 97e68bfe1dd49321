"""Compiles the kernels that carry out a rebalance: alignment, transfer plan, a rank's program, checksums."""

from __future__ import annotations

import numpy as np
import torch

from equipoise.jit.compile import for_short_loops
from equipoise.placement.alignment import align_placement
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology
from equipoise.transfer.memory.verification import checksum
from equipoise.transfer.planning.plan import plan_transfer
from equipoise.transfer.planning.rank_program import compile_program_kernels


def compile_transfer() -> None:
    """Compiles, or loads from numba's cache, all of them."""
    with for_short_loops():
        _compile_planning()
    checksum([torch.zeros(8, dtype=torch.uint8)])  # one long regular loop, which does become vectors


def _compile_planning() -> None:
    topology = EpTopology(4, 2, 3)
    old = ExpertLocationMetadata.trivial(2, 8, topology)
    p2l = old.physical_to_logical_map.numpy()
    new = ExpertLocationMetadata.from_physical_to_logical(np.roll(p2l, 5, axis=1), 8, topology)
    for staged in (1, topology.slots_per_rank):  # a tight budget takes a path of its own
        plan_transfer(old, align_placement(old, new), topology, max_staged_experts=staged)
    compile_program_kernels()
