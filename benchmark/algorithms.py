"""Compares placement algorithms on balance and moves: `make bench-algorithms`.

Next window: every policy starts from the same placement (vLLM's plan for the first window), replans on past windows
only, and is scored on the window that follows, by expected balancedness (mean rank load / maximum, averaged over
layers). Moves are slots whose new expert was not on the rank, as a share of all slots, per replan. Same window: each
plans from one window without a placement in force (those that need one start from the contiguous one) and is scored
on that window. Times are CPU seconds of one thread, the best of several.

Writes OUT/algorithms.json and OUT/algorithms.png and prints the tables, with the bars of the project's issue.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from algorithms_bars import DEFAULT, bars
from algorithms_future import future_table
from algorithms_plot import draw_frontier, draw_recourse
from algorithms_policies import Policy, baselines, full_replan, never, ours, ours_from_nothing, sources, uniform
from algorithms_report import show
from algorithms_timing import planning_times
from algorithms_workloads import (
    CONFIGURATIONS,
    Sequence,
    missing_traces,
    mixed_sequences,
    real_sequences,
    synthetic_sequences,
)
from cpu import cpu_name
from dispatch_balance import dispatch_table
from equipoise.algorithms.problem import DEFAULT_MOVE_PRICE
from equipoise.algorithms.rebalance import rebalance_experts
from equipoise.load.synthetic import SyntheticLoad, synthetic_trace
from equipoise.placement.balancedness import balancedness, mean_balancedness
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology

PRICES = (0.02, 0.05, 0.1, 0.3)  # beside the default, for the frontier
# The price of the uniform variant that bar 4 compares with: the default's.
OWN: dict[str, Policy] = {
    "never replan": never,
    "reweight": ours("reweight"),
    DEFAULT: ours(),
    **{f"equipoise, price {price}": ours(move_price=price) for price in PRICES},
    "uniform split": uniform(DEFAULT_MOVE_PRICE),
    "equipoise, full replan": full_replan,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path(__file__).parents[2] / "shared" / "traces")
    parser.add_argument("--neighbours", type=Path, default=Path("out/neighbours"), help="cache of their packages")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--quick", action="store_true", help="fewer layers and windows, no large timings")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 150)
    others, missing = baselines(arguments.neighbours)
    for name, reason in missing.items():
        console.print(f"[yellow]left out:[/] {name} ({reason})")
    real = real_sequences(arguments.traces)
    if lacking := missing_traces(arguments.traces):
        console.print(f"[yellow]left out:[/] real traces ({arguments.traces} has no {', '.join(lacking)})")
    synthetic = synthetic_sequences(6 if arguments.quick else 10, 2 if arguments.quick else 6)
    report: dict[str, Any] = {
        "cpu": cpu_name(),
        "num_cpus": os.cpu_count(),
        "load_average_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        "command": " ".join(["python", "benchmark/algorithms.py", *sys.argv[1:]]),
        "default_move_price": DEFAULT_MOVE_PRICE,
        "missing": missing,
        "sources_sha256": sources(),
    }
    report["same_window"] = same_window(real, others, arguments.quick)
    report["next_window"] = {}
    for sequence in real + mixed_sequences(arguments.traces) + synthetic:
        slow = {"deepseek original"}  # plans as sglang deepseek does
        policies = OWN | {name: policy for name, policy in others.items() if name not in slow}
        report["next_window"][sequence.name] = {
            name: next_window(sequence, policy) for name, policy in policies.items()
        } | {"kind": sequence.kind}
    report["seconds"] = planning_times(others, arguments.quick)
    report["bars"] = bars(report)
    show(report, console)
    report["dispatch"] = dispatch_table(arguments.traces, arguments.neighbours, arguments.quick, console)
    report["future"] = future_table(arguments.traces, others, arguments.quick, console)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "algorithms.json").write_text(json.dumps(report, indent=1) + "\n")
    draw_frontier(report, arguments.out / "algorithms.png")
    draw_recourse(report["future"], arguments.out / "algorithms_recourse.png")
    console.print(f"{report['cpu']}, load average {os.getloadavg()[0]:.1f}")
    console.print(f"written: {arguments.out}/algorithms.json, {arguments.out}/algorithms.png")
    return 0


def next_window(sequence: Sequence, policy: Policy) -> dict[str, float]:
    """Mean balancedness of the windows after each plan, and moves per replan as shares of the slots."""
    windows, topology = sequence.windows, sequence.topology
    num_layers = windows.shape[1]
    # DeepSeek's global plan is vLLM's; ours is the same plan and needs no wheel.
    current = rebalance_experts(windows[0], topology, algorithm="deepseek")
    plan = policy(topology)
    balance, moves, crossed, seconds = [], [], [], []
    for step in range(1, len(windows) - 1):
        started = time.thread_time()
        new = plan(windows[: step + 1], current)
        seconds.append(time.thread_time() - started)
        diff = current.diff(new)
        moves.append(diff.moves.sum() / (num_layers * topology.num_slots))
        crossed.append(diff.cross_node_moves.sum() / (num_layers * topology.num_slots))
        current = new
        balance.append(mean_balancedness(balancedness(windows[step + 1], current)))
    return {
        "balancedness": float(np.mean(balance)),
        "moves": float(np.mean(moves)),
        "cross_node_moves": float(np.mean(crossed)),
        "seconds_per_plan": float(np.mean(seconds)),
        "twins": float(np.mean(twins(current))),
    }


def twins(plan: ExpertLocationMetadata) -> np.ndarray:
    """(L,) slots that repeat an expert of their rank."""
    by_rank = plan.physical_to_logical_map.view(plan.num_layers, plan.topology.num_ranks, -1).sort(-1).values
    return by_rank.diff(dim=-1).eq(0).sum((1, 2)).numpy()


def same_window(real: list[Sequence], others: dict[str, Policy], quick: bool) -> dict[str, dict[str, Any]]:
    """Balancedness on the planned window itself, per configuration and load."""
    loads: list[tuple[str, np.ndarray, EpTopology]] = []
    for name, (layers, experts, topology, top_k) in CONFIGURATIONS.items():
        load = SyntheticLoad(1, 2 if quick else min(layers, 12), experts, tokens_per_step=8192, top_k=top_k, seed=7)
        loads.append((f"synthetic {name}", synthetic_trace(load).logical_count.astype(np.float64), topology))
    for sequence in real:
        middle = len(sequence.windows) // 2
        loads.append((sequence.name, sequence.windows[middle : middle + 1], sequence.topology))
    own = {DEFAULT: ours_from_nothing(), "deepseek hierarchical": ours_from_nothing("deepseek_hierarchical")}
    result: dict[str, dict[str, Any]] = {}
    for name, window, topology in loads:
        contiguous = ExpertLocationMetadata.trivial(window.shape[1], window.shape[2], topology)
        row: dict[str, Any] = {}
        for label, policy in (own | others).items():
            if window.shape[2] % topology.num_nodes and label == "deepseek hierarchical":
                continue
            plan = policy(topology)(window, contiguous)
            row[label] = mean_balancedness(balancedness(window[0], plan))
            if label == DEFAULT:
                row["twins"] = int(twins(plan).sum())
        result[name] = row
    return result


if __name__ == "__main__":
    sys.exit(main())
