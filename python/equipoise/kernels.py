"""Compiles every kernel that a rebalance needs, before anybody waits for one."""

from __future__ import annotations

import sys

import numpy as np
import torch

from equipoise.algorithms import WarmUp, warm_up_in_background, warming
from equipoise.expert_location import ExpertLocationMetadata
from equipoise.placement_alignment import align_placement
from equipoise.topology import EpTopology
from equipoise.transfer_plan import plan_transfer
from equipoise.transfer_program import compile_program_kernels
from equipoise.verification import checksum


def compile_transfer() -> None:
    """Compiles, or loads from numba's cache, what carrying out a rebalance needs."""
    topology = EpTopology(4, 2, 3)
    old = ExpertLocationMetadata.trivial(2, 8, topology)
    p2l = old.physical_to_logical_map.numpy()
    new = ExpertLocationMetadata.from_physical_to_logical(np.roll(p2l, 5, axis=1), 8, topology)
    for staged in (1, topology.slots_per_rank):  # a tight budget takes a path of its own
        plan_transfer(old, align_placement(old, new), topology, max_staged_experts=staged)
    compile_program_kernels()
    checksum([torch.zeros(8, dtype=torch.uint8)])


SHARES = (*warming.SHARES, compile_transfer)


def compile_kernels() -> None:
    """Compiles, or loads from numba's cache, what planning and carrying out a rebalance needs, in this process."""
    for share in SHARES:
        share()


def compile_kernels_in_background() -> WarmUp:
    """Has a child process compile them, at once and beside whatever this one does."""
    return warm_up_in_background("equipoise.kernels")


def load_compiled_kernels(compiling: WarmUp) -> None:
    """Waits for the child and loads what it has compiled; nothing if it failed: a plan compiles what it needs.

    For the thread that plans, not for one that serves.
    """
    if compiling.wait():
        compile_kernels()


if __name__ == "__main__":
    sys.exit(0 if warming.compile_side_by_side(SHARES) else 1)
