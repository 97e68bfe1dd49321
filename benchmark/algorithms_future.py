"""Judges plans by what comes after them, for each kind of dispatch: part of `make bench-algorithms`, and runs alone.

Six sections, each a table and its bars: (1) `batch`, (2) `even`, (3) `weights` against never replanning, (4) one
window against leaving the placement alone, (5) moves on stationary load, (6) planning time. Steps of (1) are later
tokens of a trace, dealt to the ranks in turns. Sequences start from the published planner's plan for their first
window and replan after every window.

Writes OUT/algorithms_future.json, and OUT/algorithms_recourse.png where (1) was run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from algorithms_bars_future import Bars, show_table
from algorithms_generators import one_window_problems, stationary, weak_spots
from algorithms_plot import draw_recourse
from algorithms_policies import Policy, baselines, never, ours
from algorithms_published import published_cases
from algorithms_recourse import batch_dispatch
from algorithms_scaling import planning_times_by_scale
from algorithms_workloads import (
    CONFIGURATIONS,
    Sequence,
    mixed_sequences,
    real_sequences,
    synthetic_sequences,
)
from equipoise.algorithms.rebalance import rebalance_experts
from equipoise.load.synthetic import SyntheticLoad, synthetic_trace
from equipoise.placement.balancedness import balancedness, mean_balancedness

HISTORIES = (2, 3, 4, 8)
LARGE_WINDOW, SETTLED = 65536, 4  # tokens; replans until load that alternates has been seen to
SECTIONS = ("batch", "even", "weights", "one", "steady", "time")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=Path(__file__).parents[2] / "shared" / "traces")
    parser.add_argument("--neighbours", type=Path, default=Path("out/neighbours"), help="cache of their packages")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--quick", action="store_true", help="fewer layers, windows and problems, no large timings")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections to run")
    arguments = parser.parse_args()
    console = Console(width=150)
    others, missing = baselines(arguments.neighbours)
    for name, reason in missing.items():
        console.print(f"[yellow]left out:[/] {name} ({reason})")
    report = future_table(arguments.traces, others, arguments.quick, console, tuple(arguments.only))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "algorithms_future.json").write_text(json.dumps(report, indent=1) + "\n")
    draw_recourse(report, arguments.out / "algorithms_recourse.png")
    console.print(f"written: {arguments.out}/algorithms_future.json")
    return 0


def future_table(
    traces: Path, others: dict[str, Policy], quick: bool, console: Console, only: tuple[str, ...] = SECTIONS
) -> dict[str, Any]:
    """Measures and prints every section; what needs the traces or a neighbour that is missing is left out."""
    bars = Bars(console)
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "batch": lambda: batch_dispatch(traces, quick, bars),
        "even": lambda: even_split(traces, others, quick, bars),
        "weights": lambda: planned_weights(traces, others, quick, bars),
        "one": lambda: one_window(quick, bars),
        "steady": lambda: steady_load(quick, bars),
        "time": lambda: planning_times_by_scale(others, quick, bars),
    }
    report = {name: sections[name]() for name in only}
    return report | {"bars": bars.rows}


def run(sequence: Sequence, policy: Policy, history: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Balancedness of the window after each replan, and moves of the replan as a share of all slots."""
    windows, topology = sequence.windows, sequence.topology
    current = rebalance_experts(windows[0], topology, algorithm="deepseek")
    plan, balance, moves = policy(topology), [], []
    for step in range(1, len(windows) - 1):
        new = plan(windows[max(0, step + 1 - history) : step + 1], current)
        moves.append(current.diff(new).moves.sum() / (windows.shape[1] * topology.num_slots))
        current = new
        balance.append(mean_balancedness(balancedness(windows[step + 1], current)))
    return np.array(balance), np.array(moves)


def even_split(traces: Path, others: dict[str, Policy], quick: bool, bars: Bars) -> dict[str, Any]:
    """`even`: same window against the published planner, next window against vLLM."""
    report: dict[str, Any] = {"same": {}, "next": {}}
    loads = []
    for name, (layers, experts, topology, top_k) in CONFIGURATIONS.items():
        load = SyntheticLoad(1, 2 if quick else min(layers, 12), experts, tokens_per_step=8192, top_k=top_k, seed=7)
        loads.append((name, synthetic_trace(load).logical_count[0].astype(np.float64), topology))
    real = real_sequences(traces)
    loads += [(s.name, s.windows[len(s.windows) // 2], s.topology) for s in real]
    for name, window, topology in loads:
        own = balancedness(window, rebalance_experts(window, topology, dispatch="even"))
        published = balancedness(window, rebalance_experts(window, topology, algorithm="deepseek"))
        report["same"][name] = {"even": mean_balancedness(own), "published": mean_balancedness(published)}
    show_table(bars.console, "even: same window", report["same"])
    lead = min((row["even"] - row["published"], name) for name, row in report["same"].items())
    bars.at_least("2 even, same window, worst lead over the published planner", lead[0], 0.0, lead[1])
    report["published"] = published_cases()
    show_table(bars.console, "even: peak-to-average ratio of cases that others publish", report["published"])
    for name, row in report["published"].items():
        bars.at_most(f"2 even, PAR over the published one, {name}", row["even"] / row["as published"], 1.0)
    if real and "vllm" in others:
        for sequence in real[::4] if quick else real:
            (own, moves), (theirs, their_moves) = (
                run(sequence, ours(dispatch="even")),
                run(sequence, others["vllm"]),
            )
            report["next"][sequence.name] = {
                "even": own.mean(),
                "vllm": theirs.mean(),
                "moves": moves.mean(),
                "vllm moves": their_moves.mean(),
            }
        show_table(bars.console, "even: next window, real traces", report["next"])
        mean = {key: np.mean([row[key] for row in report["next"].values()]) for key in ("even", "vllm", "moves")}
        their_moves = np.mean([row["vllm moves"] for row in report["next"].values()])
        bars.at_least("2 even, next window, ratio to vLLM", mean["even"] / mean["vllm"], 1.03)
        bars.at_most("2 even, moves, ratio to vLLM", mean["moves"] / their_moves, 0.15)
    return report


def planned_weights(traces: Path, others: dict[str, Policy], quick: bool, bars: Bars) -> dict[str, Any]:
    """`weights`: against never replanning, over all sequences and lengths of history."""
    num_windows, num_layers = (8, 1) if quick else (14, 3)
    real, weak = real_sequences(traces), weak_spots(num_windows, num_layers)
    sequences = real + mixed_sequences(traces) + weak + synthetic_sequences(num_windows, num_layers)
    rows: dict[str, dict[str, float]] = {}
    for sequence in sequences[::3] if quick else sequences:
        still, _ = run(sequence, never)
        row = {"never": still.mean()}
        for history in HISTORIES:
            row[f"{history} windows"], row[f"moves, {history}"] = (x.mean() for x in run(sequence, ours(), history))
            row[f"first of {history}"] = first_replan(sequence, history)
        if "ascend flashlb" in others and sequence.kind == "weak spot":
            row["flashlb"] = run(sequence, others["ascend flashlb"])[0].mean()
        rows[sequence.name] = row
    show_table(bars.console, "weights: next window, by windows of history; first replan less never", rows)
    worst = min(
        (row[f"{n} windows"] - row["never"], f"{name}, {n} windows") for name, row in rows.items() for n in HISTORIES
    )
    bars.at_least("3 weights, worst against never replanning", worst[0], -0.005, worst[1])
    worst = min((row[f"first of {n}"], f"{name}, {n} windows") for name, row in rows.items() for n in HISTORIES)
    bars.at_least("3 weights, first replan, worst against none", worst[0], -0.005, worst[1])
    # At 8192 tokens a window counting noise alone leaves .96 of a placement that knows both workloads.
    large = next(s for s in weak_spots(14, num_layers, window_tokens=LARGE_WINDOW) if s.name == "alternating 288/32")
    settled = float(run(large, ours())[0][SETTLED:].mean())
    bars.at_least(
        f"3 weights, alternating load at 288/32, {LARGE_WINDOW} tokens, after {SETTLED} replans", settled, 0.97
    )
    for name, row in rows.items():
        if "288/144" in name and "flashlb" in row:
            bars.at_least(f"3 weights, {name}, lead over flashlb", row["8 windows"] - row["flashlb"], 0.0)
    shared = [rows[s.name]["8 windows"] for s in real if s.name in rows]
    if shared and not quick:
        bars.at_least("3 weights, next window on the shared traces", float(np.mean(shared)), 0.839)
    return rows


def first_replan(sequence: Sequence, history: int) -> float:
    """What the first replan on so many windows gains over none, in balancedness of the three windows that follow."""
    windows, topology = sequence.windows, sequence.topology
    if history >= len(windows):
        return 0.0
    start = rebalance_experts(windows[0], topology, algorithm="deepseek")
    plan = rebalance_experts(windows[:history], topology, current=start)
    later = windows[history : history + 3]
    return mean_balancedness(balancedness(later, plan)) - mean_balancedness(balancedness(later, start))


def one_window(quick: bool, bars: Bars) -> dict[str, Any]:
    """One window of counts: what a replan gains or loses on later windows of the same popularity."""
    gains = {}
    for number, problem in enumerate(one_window_problems(40 if quick else 200)):
        plan = rebalance_experts(problem.window, problem.topology, current=problem.current)
        gain = mean_balancedness(balancedness(problem.later, plan))
        gain -= mean_balancedness(balancedness(problem.later, problem.current))
        gains[f"{number}: {problem.name}"] = gain
    worst = sorted(gains.items(), key=lambda item: item[1])
    show_table(bars.console, "one window: the worst", {name: {"gain": gain} for name, gain in worst[:6]})
    harmed = float(sum(gain < -0.005 for gain in gains.values()))
    bars.at_most(f"4 one window, harmed of {len(gains)}", harmed, 0)
    bars.at_least("4 one window, worst", worst[0][1], -0.005, worst[0][0])
    bars.at_least("4 one window, mean gain", float(np.mean(list(gains.values()))), 0.0)
    return gains


def steady_load(quick: bool, bars: Bars) -> dict[str, Any]:
    """Slots a layer that move, replan by replan, where windows differ by counting noise alone."""
    rows: dict[str, Any] = {}
    for shape in ("96/32", "288/32"):
        for tokens in (64, 512, 4096):
            later = []
            for seed in range(1 if quick else 3):
                sequence = stationary(shape, tokens, 12, 2 if quick else 4, seed)
                balance, moves = run(sequence, ours())
                still, _ = run(sequence, never)
                later.append(moves * sequence.topology.num_slots)
            by_replan = np.mean(later, axis=0)
            rows[f"{shape}, {tokens} tokens"] = {
                "balancedness": balance.mean(),
                "never": still.mean(),
                "first three": by_replan[:3].mean(),
                "after": by_replan[3:].mean(),
            }
            bars.at_most(f"5 stationary {shape}, {tokens} tokens: slots a layer", by_replan[3:].mean(), 0.2)
    show_table(bars.console, "stationary load: slots a layer and replan", rows)
    return rows


if __name__ == "__main__":
    sys.exit(main())
