"""Planning time by number of ranks, after a shift and where nothing is worth moving, against vLLM's planner."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from algorithms_bars_future import Bars, show_table
from algorithms_generators import counted, popularity
from algorithms_policies import Policy, ours
from algorithms_timing import seconds_of
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

NUM_ROUNDS = 9


def planning_times_by_scale(others: dict[str, Policy], quick: bool, bars: Bars) -> dict[str, Any]:
    """CPU seconds of one thread: four windows from another workload's placement, and steady; medians of rounds.

    Steady load is planned for on eight windows, which a planner has at hand by then, and on four, soon after the shift.
    Each round runs every planner once, so that what slows the machine down slows all of them: ratios are those of a
    round, and their median counts.
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
        plan, even = ours()(topology), ours(dispatch="even")(topology)
        long_settled = rebalance_experts(windows[:8], topology, current=settled)
        work = {
            "shift": partial(plan, windows[:4], shifted),
            "steady": partial(plan, windows[1:], long_settled),
            "steady, 4 windows": partial(plan, windows[1:5], settled),
            "even": partial(even, windows[1:5], settled),
        }
        if "vllm" in others:
            work["vllm"] = partial(others["vllm"](topology), windows[:4], shifted)
        seconds = seconds_by_round(3 if quick else NUM_ROUNDS, work)
        rows[name] = {each: float(np.median(found)) for each, found in seconds.items()}
        rows[name]["moves when steady"] = float(long_settled.diff(plan(windows[1:], long_settled)).moves.sum() / layers)
        if "vllm" in others:
            most = 1.0 if topology.num_ranks <= 144 else 2.0
            for kind, bar in (("shift", most), ("steady", 0.1)):
                ratio = float(np.median(seconds[kind] / seconds["vllm"]))
                bars.at_most(f"6 planning time {name}, {kind}, ratio to vLLM", ratio, bar)
    show_table(bars.console, "planning, CPU seconds of one thread", rows)
    return rows


def seconds_by_round(num_rounds: int, work: dict[str, Callable[[], Any]]) -> dict[str, np.ndarray]:
    """(num_rounds,) CPU seconds of each kind of ``work``, by its name; each has run once before."""
    for each in work.values():
        each()
    rounds = [[seconds_of(each) for each in work.values()] for _ in range(num_rounds)]
    return dict(zip(work, np.array(rounds).T, strict=True))
