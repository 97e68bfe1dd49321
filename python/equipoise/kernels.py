"""Compiles every kernel that a rebalance needs, before anybody waits for one."""

from __future__ import annotations

import numpy as np

from equipoise.algorithms import warm_up
from equipoise.expert_location import ExpertLocationMetadata
from equipoise.placement_alignment import align_placement
from equipoise.topology import EpTopology
from equipoise.transfer_plan import plan_transfer


def compile_kernels() -> None:
    """Compiles, or loads from numba's cache, what planning a placement and its transfer needs."""
    warm_up()
    topology = EpTopology(4, 2, 3)
    old = ExpertLocationMetadata.trivial(2, 8, topology)
    p2l = old.physical_to_logical_map.numpy()
    new = ExpertLocationMetadata.from_physical_to_logical(np.roll(p2l, 5, axis=1), 8, topology)
    for staged in (1, topology.slots_per_rank):  # a tight budget takes a path of its own
        plan_transfer(old, align_placement(old, new), topology, max_staged_experts=staged)


if __name__ == "__main__":
    compile_kernels()
