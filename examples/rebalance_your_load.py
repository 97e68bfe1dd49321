"""Rebalance from Python: your own load matrix in, a placement and its price out. Runs in a second, needs no GPU.

python examples/rebalance_your_load.py
"""

import numpy as np

from equipoise import EpTopology, ExpertLocationMetadata, balancedness, plan_transfer, rebalance_experts

# Tokens per (layer, expert), as any engine counts them. Here: 26 layers of 64 experts with a Zipf-like skew.
rng = np.random.default_rng(0)
popularity = 1.0 / np.arange(1, 65) ** 0.8
load = np.stack([rng.multinomial(50_000, rng.permutation(popularity) / popularity.sum()) for _ in range(26)])

# 64 experts plus 8 redundant slots on 8 ranks in 2 nodes: 9 slots a rank.
topology = EpTopology.for_experts(64, 8, num_ranks=8, num_nodes=2)
current = ExpertLocationMetadata.trivial(num_layers=26, num_logical_experts=64, topology=topology)

print(f"{'algorithm':24s} {'balancedness':>12s} {'slots changed':>14s} {'crossing nodes':>15s}")
print(f"{'(as it is)':24s} {balancedness(load, current).mean():12.3f}")
for algorithm in ("deepseek", "deepseek_hierarchical", "auto"):
    planned = rebalance_experts(load, topology, algorithm=algorithm, current=current)
    diff = current.diff(planned)
    print(
        f"{algorithm:24s} {balancedness(load, planned).mean():12.3f} "
        f"{diff.slots_changed.sum():14d} {diff.cross_node_moves.sum():15d}"
    )

# Who would send what to whom: pure, the same on every rank.
plan = plan_transfer(current, planned, topology)
layer = plan.layers[0]
print(f"\nlayer {layer.layer_id}: {layer.num_transfers} transfers in {layer.num_rounds} rounds, for example")
for transfer in layer.batches[0].transfers[:3]:
    print(f"  expert {transfer.expert}: slot {transfer.source_slot} -> slot {transfer.destination_slot}")
