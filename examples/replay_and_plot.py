"""Replay a trace and plot it: what rebalancing would have gained on recorded load, window by window.

    python examples/replay_and_plot.py [TRACE] [PICTURE.png]

Without arguments it takes the sample trace that comes with Equipoise. Needs matplotlib (pip install equipoise[plot]).
"""

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import equipoise.engine.demo_model
from equipoise import EpTopology, LoadTrace
from equipoise.replay.simulate import replay

source = sys.argv[1] if len(sys.argv) > 1 else equipoise.engine.demo_model.sample_trace()
picture = sys.argv[2] if len(sys.argv) > 2 else "replay.png"

trace = LoadTrace.open(source)
topology = EpTopology.for_experts(trace.num_logical_experts, num_redundant_experts=8, num_ranks=8)
figure, axes = plt.subplots(figsize=(9, 4))
result = None
for algorithm in ("deepseek", "auto"):
    result = replay(trace, topology, algorithm, window=16)
    moved = sum(plan.slots_changed for plan in result.plans)
    axes.plot(np.nanmean(result.balancedness, axis=1), label=f"{algorithm}: {moved} slots changed")
    print(f"{algorithm:10s} mean balancedness {result.mean_balancedness:.3f}, {moved} slots changed")
assert result is not None
print(f"{'(nothing)':10s} mean balancedness {result.mean_no_rebalancing:.3f}")
axes.plot(np.nanmean(result.no_rebalancing, axis=1), "k--", label="no rebalancing")
axes.plot(np.nanmean(result.oracle, axis=1), "k:", label="plans that know the future")
axes.set(xlabel="window", ylabel="balancedness, mean over layers", ylim=(0, 1.02))
axes.legend(loc="lower right")
figure.tight_layout()
figure.savefig(picture, dpi=120)
print(f"wrote {picture}")
