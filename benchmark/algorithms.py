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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from algorithms_plot import draw_frontier
from algorithms_policies import Policy, baselines, full_replan, never, ours, ours_from_nothing, sources, uniform
from algorithms_workloads import CONFIGURATIONS, Sequence, real_sequences, synthetic_sequences
from cpu import cpu_name
from equipoise.algorithms import DEFAULT_MOVE_PRICE, rebalance_experts
from equipoise.expert_location import ExpertLocationMetadata
from equipoise.metrics import balancedness, mean_balancedness
from equipoise.replay.synthetic import SyntheticLoad, synthetic_trace
from equipoise.topology import EpTopology

PRICES = (0.02, 0.05, 0.1, 0.3)  # beside the default, for the frontier
DEFAULT = "equipoise"
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
    if not real:
        console.print(f"[yellow]left out:[/] real traces, no folder {arguments.traces}")
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
    for sequence in real + synthetic:
        slow = {"deepseek original"}  # plans as sglang deepseek does
        policies = OWN | {name: policy for name, policy in others.items() if name not in slow}
        report["next_window"][sequence.name] = {
            name: next_window(sequence, policy) for name, policy in policies.items()
        } | {"real": sequence.real}
    report["seconds"] = planning_times(others, arguments.quick)
    report["bars"] = bars(report)
    show(report, console)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "algorithms.json").write_text(json.dumps(report, indent=1) + "\n")
    draw_frontier(report, arguments.out / "algorithms.png")
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


def best_of(times: int, work: Callable[[], Any], clock: Callable[[], float] = time.thread_time) -> float:
    seconds = []
    for _ in range(times):
        started = clock()
        work()
        seconds.append(clock() - started)
    return min(seconds)


def planning_times(others: dict[str, Policy], quick: bool) -> dict[str, float]:
    """Seconds per plan. 58x256 -> 288/32/4 on one thread; 64x1024 -> 1536/512/64 wall clock on two."""
    layers, experts, topology, top_k = CONFIGURATIONS["58x256 -> 288/32/4"]
    load = SyntheticLoad(6, layers, experts, tokens_per_step=8192, top_k=top_k, drift_steps=60.0, seed=3)
    windows = synthetic_trace(load).logical_count.astype(np.float64)
    planned = rebalance_experts(windows[0], topology, algorithm="deepseek")
    own = rebalance_experts(windows[:4], topology, current=planned)
    result = {
        "equipoise, from vLLM's placement": best_of(5, lambda: ours()(topology)(windows[:5], planned)),
        "equipoise, from its own": best_of(5, lambda: ours()(topology)(windows[:5], own)),
        "equipoise, from nothing": best_of(5, lambda: rebalance_experts(windows[1:5], topology, num_threads=1)),
        "reweight": best_of(5, lambda: ours("reweight")(topology)(windows[:5], planned)),
        "deepseek (ours)": best_of(
            5, lambda: rebalance_experts(windows[4], topology, algorithm="deepseek", num_threads=1)
        ),
    }
    for name, policy in others.items():
        plan = policy(topology)
        plan(windows[:5], planned)
        result[name] = best_of(3 if name in ("vllm", "sglang deepseek") else 1, lambda p=plan: p(windows[:5], planned))
    result["cold compile, CPU"], result["cold compile, wall"], result["warm start"] = compile_times()
    if not quick:
        large = EpTopology(512, 64, 3)
        load = SyntheticLoad(5, 64, 1024, tokens_per_step=32768, top_k=8, drift_steps=60.0, seed=4)
        windows = synthetic_trace(load).logical_count.astype(np.float64)
        current = rebalance_experts(windows[0], large, algorithm="deepseek")
        one, four = windows[3], windows[:4]
        for label, load, given in (
            ("one window, from nothing", one, None),
            ("four windows, from nothing", four, None),
            ("four windows, from vLLM's placement", four, current),
        ):
            name = f"64x1024 -> 1536/512, {label}"
            work = partial(rebalance_experts, load, large, current=given, num_threads=2)
            plan = work()
            result[f"{name}, 2 threads, wall"] = best_of(2, work, time.perf_counter)
            result[f"{name}, 1 thread, CPU"] = best_of(1, partial(work, num_threads=1))
            result[f"{name}: balancedness"] = mean_balancedness(balancedness(windows[3], plan))
            result[f"{name}: next"] = mean_balancedness(balancedness(windows[4], plan))
        if "vllm" in others:
            plan = others["vllm"](large)(windows[:4], current)
            result["64x1024 -> 1536/512, vllm: balancedness"] = mean_balancedness(balancedness(windows[3], plan))
            result["64x1024 -> 1536/512, vllm: next"] = mean_balancedness(balancedness(windows[4], plan))
    return {name: float(value) for name, value in result.items()}


def compile_times() -> tuple[float, float, float]:
    """Seconds that all kernels take to compile into an empty cache (CPU, wall), and to load from it afterwards.

    They are compiled in the background: the start of those processes and their imports count.
    """
    cold = (
        "import resource, time; from equipoise.algorithms import warm_up_in_background;"
        "start = time.perf_counter(); assert warm_up_in_background().wait(); wall = time.perf_counter() - start;"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); print(used.ru_utime + used.ru_stime, wall)"
    )
    warm = (
        "import time, torch, numba; from equipoise.algorithms import warm_up;"
        "start = time.perf_counter(); warm_up(); print(time.perf_counter() - start)"
    )
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"NUMBA_CACHE_DIR": cache}
        runs = [
            subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
            for code in (cold, warm, warm)
        ]
    (cpu, wall), *loads = [[float(x) for x in run.stdout.split()] for run in runs]
    return cpu, wall, min(load for (load,) in loads)


def bars(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The bars of the issue: measured, wanted, met. Those whose baseline is missing are left out."""
    result: dict[str, dict[str, Any]] = {}

    def bar(name: str, measured: float, wanted: float, at_least: bool = True) -> None:
        met = measured >= wanted if at_least else measured <= wanted
        result[name] = {"measured": measured, "wanted": ("at least " if at_least else "at most ") + f"{wanted:g}"}
        result[name]["met"] = bool(met)

    same = report["same_window"]
    rivals = {name for row in same.values() for name in row} - {DEFAULT, "twins"}
    worst = [(row[DEFAULT] - row[name], where, name) for where, row in same.items() for name in rivals & set(row)]
    bar("1 same window, worst lead over any baseline", min(worst)[0], 0.0)
    result["1 same window, worst lead over any baseline"]["where"] = f"{min(worst)[2]} on {min(worst)[1]}"
    published = "sglang deepseek"  # a copy of DeepSeek's
    at_96 = [row[DEFAULT] / row[published] for name, row in same.items() if "96/32" in name and published in row]
    if at_96:
        bar("1 same window at 96/32, mean ratio to DeepSeek", float(np.mean(at_96)), 1.05)
    runs = report["next_window"]
    bar(
        "1 same-rank duplicates",
        sum(row["twins"] for row in same.values()) + sum(row[DEFAULT]["twins"] for row in runs.values()),
        0,
        at_least=False,
    )
    real = {name: row for name, row in runs.items() if row["real"]}
    drift = {name: row for name, row in runs.items() if not row["real"]}

    def mean(rows: dict[str, Any], policy: str, key: str = "balancedness") -> float:
        return float(np.mean([row[policy][key] for row in rows.values()]))

    def worst_ratio(rows: dict[str, Any], policy: str) -> tuple[float, str]:
        return min((row[DEFAULT]["balancedness"] / row[policy]["balancedness"], name) for name, row in rows.items())

    have = set(next(iter(runs.values())))
    if real and "vllm" in have:
        bar("2 next window, ratio of means to vLLM", mean(real, DEFAULT) / mean(real, "vllm"), 1.03)
        ratio, where = worst_ratio(real, "vllm")
        bar("2 next window, worst ratio to vLLM on a real trace", ratio, 0.99)
        result["2 next window, worst ratio to vLLM on a real trace"]["where"] = where
        bar("2 moves, ratio to vLLM", mean(real, DEFAULT, "moves") / mean(real, "vllm", "moves"), 0.10, False)
        key = "cross_node_moves"
        bar("2 cross-node moves, ratio to vLLM", mean(real, DEFAULT, key) / mean(real, "vllm", key), 0.06, False)
    if "vllm" in have:
        ratio, where = worst_ratio(drift, "vllm")
        bar("2 next window, worst ratio to vLLM on synthetic load", ratio, 0.96)
        result["2 next window, worst ratio to vLLM on synthetic load"]["where"] = where
    if real and "ascend flashlb" in have:
        bar("3 next window, ratio to flashlb", mean(real, DEFAULT) / mean(real, "ascend flashlb"), 0.99)
        bar(
            "3 moves, ratio to flashlb",
            mean(real, DEFAULT, "moves") / mean(real, "ascend flashlb", "moves"),
            0.25,
            False,
        )
    for rows, where in ((runs, ""), (real, ", real traces alone")):
        if not rows:
            continue
        ratio = mean(rows, DEFAULT) / mean(rows, "uniform split")
        bar(f"4 joint weights, balance ratio to uniform split{where}", ratio, 1.0)
        moves = mean(rows, DEFAULT, "moves") / mean(rows, "uniform split", "moves")
        bar(f"4 joint weights, moves ratio to uniform split{where}", moves, 0.60, False)
        gain = 100 * (mean(rows, "reweight") - mean(rows, "never replan"))
        bar(f"4 reweight alone, points over never{where}", gain, 2.0)
        full = "equipoise, full replan"
        bar(f"5 balance, ratio to own full replan{where}", mean(rows, DEFAULT) / mean(rows, full), 0.97)
        moves = mean(rows, DEFAULT, "moves") / mean(rows, full, "moves")
        bar(f"5 moves, ratio to own full replan{where}", moves, 0.25, False)
    seconds = report["seconds"]
    for start in ("from vLLM's placement", "from nothing"):
        mine = seconds[f"equipoise, {start}"]
        if "vllm" in seconds:
            bar(f"6 planning time {start}, ratio to vLLM", mine / seconds["vllm"], 2.0, False)
        if "deepseek original" in seconds:
            bar(f"6 planning time {start}, ratio to DeepSeek's Python", mine / seconds["deepseek original"], 0.2, False)
    large = "64x1024 -> 1536/512"
    for name in [name for name in seconds if name.startswith(large) and name.endswith("wall")]:
        bar(f"6 {name}, seconds", seconds[name], 2.0, False)
    if f"{large}, vllm: balancedness" in seconds:
        lead = seconds[f"{large}, one window, from nothing: balancedness"] - seconds[f"{large}, vllm: balancedness"]
        bar(f"6 {large}, one window: lead over vLLM on that window", lead, 0.0)
    bar("6 cold compile, seconds", seconds["cold compile, wall"], 10.0, False)
    bar("6 warm start, seconds", seconds["warm start"], 0.5, False)
    return result


def show(report: dict[str, Any], console: Console) -> None:
    runs = report["next_window"]
    names = [name for name in next(iter(runs.values())) if name != "real"]
    for title, rows in (
        ("Next window, real traces", [row for row in runs.values() if row["real"]]),
        ("Next window, synthetic drift and shift", [row for row in runs.values() if not row["real"]]),
    ):
        if not rows:
            continue
        table = Table("policy", "balancedness", "moves", "cross-node", title=f"{title}: mean of {len(rows)} sequences")
        for name in names:
            mean = {key: np.mean([row[name][key] for row in rows]) for key in rows[0][name]}
            table.add_row(
                name, f"{mean['balancedness']:.3f}", f"{mean['moves']:.1%}", f"{mean['cross_node_moves']:.1%}"
            )
        console.print(table)
    columns = list(next(iter(report["same_window"].values())))
    table = Table("configuration", *columns, title="Same window: balancedness")
    for name, row in report["same_window"].items():
        cells = ["" if row.get(c) is None else str(row[c]) if c == "twins" else f"{row[c]:.3f}" for c in columns]
        table.add_row(name, *cells)
    console.print(table)
    table = Table("what", "value", title="Planning: seconds (58x256 -> 288/32/4, one thread, CPU, unless named)")
    for name, value in report["seconds"].items():
        table.add_row(name, f"{value:.3f}")
    console.print(table)
    table = Table("bar", "measured", "wanted", "met", title="Bars")
    for name, row in report["bars"].items():
        table.add_row(name, f"{row['measured']:.4g}", row["wanted"], "yes" if row["met"] else "[red]no[/]")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
