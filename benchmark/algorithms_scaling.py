"""Planning time by number of ranks, after a shift and where nothing is worth moving, against vLLM's planner."""

from __future__ import annotations

from typing import Any

import numpy as np

from algorithms_bars_future import Bars, show_table
from algorithms_generators import counted, popularity
from algorithms_policies import Policy, ours
from algorithms_timing import best_of
from equipoise.algorithms.rebalance import rebalance_experts
from equipoise.topology import EpTopology

SCALES = {
    # name: (layers, logical experts, topology, top-k)
    "58x256 -> 288/32": (58, 256, EpTopology(32, 4, 9), 8),
    "58x256 -> 320/64": (58, 256, EpTopology(64, 8, 5), 8),
    "58x256 -> 288/144": (58, 256, EpTopology(144, 18, 2), 8),
    "64x512 -> 768/256": (64, 512, EpTopology(256, 32, 3), 8),
    "64x1024 -> 1536/512": (64, 1024, EpTopology(512, 64, 3), 8),
}


def planning_times_by_scale(others: dict[str, Policy], quick: bool, bars: Bars) -> dict[str, Any]:
    """CPU seconds of one thread, the best of three: four windows from another workload's placement, and steady.

    Steady load is planned for on eight windows, which a planner has at hand by then, and on four, soon after the shift.
    """
    rows: dict[str, dict[str, float]] = {}
    for name, (layers, experts, topology, top_k) in list(SCALES.items())[: 2 if quick else None]:
        rng = np.random.default_rng(topology.num_slots)
        before, after = (popularity(rng, layers, experts, top_k, 0.6) for _ in range(2))
        windows = counted(rng, np.broadcast_to(after, (9, *after.shape)), 32768 * top_k)
        shifted = rebalance_experts(counted(rng, before, 32768 * top_k), topology, algorithm="deepseek")
        settled = rebalance_experts(windows[:4], topology, current=shifted)
        for _ in range(2):
            settled = rebalance_experts(windows[:4], topology, current=settled)
        plan = ours()(topology)
        long_settled = rebalance_experts(windows[:8], topology, current=settled)
        row = {
            "shift": best_of(3, lambda p=plan, w=windows, c=shifted: p(w[:4], c)),
            "steady": best_of(3, lambda p=plan, w=windows, c=long_settled: p(w[1:], c)),
            "steady, 4 windows": best_of(3, lambda p=plan, w=windows, c=settled: p(w[1:5], c)),
            "even": best_of(2, lambda w=windows, t=topology, c=settled: ours(dispatch="even")(t)(w[1:5], c)),
            "moves when steady": float(long_settled.diff(plan(windows[1:], long_settled)).moves.sum() / layers),
        }
        if "vllm" in others:
            theirs = others["vllm"](topology)
            theirs(windows[:4], shifted)
            row["vllm"] = best_of(3, lambda p=theirs, w=windows, c=shifted: p(w[:4], c))
            most = 1.0 if topology.num_ranks <= 144 else 2.0
            bars.at_most(f"6 planning time {name}, shift, ratio to vLLM", row["shift"] / row["vllm"], most)
            bars.at_most(f"6 planning time {name}, steady, ratio to vLLM", row["steady"] / row["vllm"], 0.1)
        rows[name] = row
    show_table(bars.console, "planning, CPU seconds of one thread", rows)
    return rows
