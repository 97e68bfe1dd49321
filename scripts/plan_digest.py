"""Prints one hash over many placements and transfer plans: equal before and after a change that must not change them.

The problems are random with fixed seeds and take every registered algorithm through several shapes, with and without a
placement in force, move limits and groups. Run it before and after a refactoring and compare the lines.
"""

from __future__ import annotations

import argparse
import hashlib

import numpy as np

from equipoise import EpTopology, ExpertLocationMetadata, available_algorithms, plan_transfer, rebalance_experts

SHAPES = (  # ranks, nodes, experts, slots per rank, layers, windows
    (4, 2, 8, 3, 3, 1),
    (8, 2, 64, 9, 4, 8),
    (16, 4, 64, 5, 3, 4),
    (32, 4, 64, 3, 2, 2),
    (32, 4, 256, 9, 2, 3),
    (6, 3, 12, 4, 3, 5),
    (1, 1, 8, 8, 2, 1),
)


def problems(seeds: int):
    """Yields (load (T, L, E), topology, num_groups, max_moves_per_layer, with_current)."""
    for seed in range(seeds):
        for ranks, nodes, experts, slots, layers, windows in SHAPES:
            rng = np.random.default_rng([seed, ranks, experts])
            load = np.round(rng.gamma(0.6, 300, size=(windows, layers, experts)))
            if seed % 4 == 3:
                load *= rng.random(load.shape) < 0.3
            topology = EpTopology(ranks, nodes, slots)
            limit = (None, None, 3, 0)[seed % 4]
            yield load, topology, (nodes if seed % 2 else None), limit, seed % 3 != 0


def digest(seeds: int) -> dict[str, str]:
    """One hash an algorithm, over its maps, weights and the transfer plans towards them."""
    found = {}
    for algorithm in available_algorithms():
        total = hashlib.sha256()
        for load, topology, groups, limit, with_current in problems(seeds):
            trivial = ExpertLocationMetadata.trivial(load.shape[1], load.shape[2], topology)
            current = trivial if with_current else None
            planned = rebalance_experts(
                load, topology, algorithm=algorithm, current=current, num_groups=groups, max_moves_per_layer=limit
            )
            total.update(planned.physical_to_logical_map.numpy().tobytes())
            total.update(planned.dispatch_weights.numpy().tobytes())
            total.update(str(plan_transfer(trivial, planned, topology, max_staged_experts=4).digest).encode())
        found[algorithm] = total.hexdigest()[:16]
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=12, help="random problems of each shape (default: %(default)s)")
    for name, value in digest(parser.parse_args().seeds).items():
        print(f"{name:24s} {value}")
