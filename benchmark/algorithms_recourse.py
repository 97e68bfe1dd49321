"""Plans for `dispatch=batch`, judged by later batches of a trace, split by the package's own dispatcher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from algorithms_bars_future import Bars, show_table
from algorithms_workloads import TASKS, missing_traces
from equipoise.algorithms.problem import DISPATCH_KINDS
from equipoise.algorithms.rebalance import rebalance_experts
from equipoise.dispatch.policy import DispatchPolicy
from equipoise.dispatch.score import DispatchScorer, counts_by_source
from equipoise.placement.balancedness import balancedness, mean_balancedness
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology

PLACES = {"96/32": EpTopology(32, 4, 3), "80/16": EpTopology(16, 2, 5)}
WANTED = {"96/32": {"all": 0.99, "node": 0.985, "rank": 0.965}, "80/16": {"all": 0.995, "node": 0.99, "rank": 0.98}}
WINDOW = 1024
NUM_EXPERTS, TOP_K = 64, 6
ONE_TASK = ("intent", "translation")
PRICES = (0.04, 0.12, 0.3)


def batch_dispatch(traces: Path, quick: bool, bars: Bars) -> dict[str, Any]:
    """Steady load, task after task, and the frontier of balance against moves for the three kinds of dispatch."""
    if missing_traces(traces):
        bars.console.print(f"[yellow]left out:[/] batch dispatch, no traces in {traces}")
        return {}
    topk = {task: np.concatenate([np.load(traces / n)["topk"] for n in names]) for task, names in TASKS.items()}
    report: dict[str, Any] = {"one task": {}, "frontier": {}}
    # Tokens that follow one another are of one sequence, so batches in this order drift; steady load has none of that.
    shuffled = {task: np.random.default_rng(0).permutation(topk[task]) for task in ONE_TASK}
    for place, topology in PLACES.items():
        for order, tokens in (("steady", shuffled), ("in sequence", topk)):
            rows = {
                f"{place} {task} {order}, {per_rank} tokens a rank": one_task(tokens[task], topology, per_rank, quick)
                for task in ONE_TASK
                for per_rank in (128, 32)
            }
            report["one task"] |= rows
            where = f"1 batch, {place} {order}"
            for scope, wanted in WANTED[place].items():
                cells = [row[scope] for name, row in rows.items() if "128 tokens" in name]
                bars.at_least(f"{where}, 128 tokens, scope {scope}", float(np.mean(cells)), wanted)
            cells = [row["node"] for name, row in rows.items() if " 32 tokens" in name]
            bars.at_least(f"{where}, 32 tokens, scope node", float(np.mean(cells)), 0.975)
            bars.at_most(f"{where}, moves a replan after the first", max(r["later"] for r in rows.values()), 0.06)
    show_table(bars.console, "batch: later steps of one task, by scope; moves of the replans", report["one task"])
    for place, topology in PLACES.items():
        both = frontier(topk["both"], topology, quick)
        report["frontier"] |= {f"{place} {name}": row for name, row in both.items()}
        if place == "96/32":
            bars.at_least("1 batch, 96/32, task after task", both["batch, price 0.12"]["balancedness"], 0.94)
    show_table(bars.console, "task after task: balance of the next window against moves", report["frontier"])
    return report


def windows_of(topk: np.ndarray) -> np.ndarray:
    """(T, L, E) counts in windows of :data:`WINDOW` tokens of (N, L, K)."""
    parts = [topk[first : first + WINDOW] for first in range(0, len(topk) - WINDOW + 1, WINDOW)]
    return np.stack([counts_by_source(part, 1, NUM_EXPERTS)[0] for part in parts]).astype(np.float64)


def one_task(topk: np.ndarray, topology: EpTopology, per_rank: int, quick: bool) -> dict[str, float]:
    """Replans window by window through the first half of a task, and scores steps of the second half."""
    windows, size = windows_of(topk), per_rank * topology.num_ranks
    half = len(windows) // 2
    current = rebalance_experts(windows[0], topology, algorithm="deepseek")
    moves = []
    for step in range(1, len(windows) - 1):
        new = rebalance_experts(
            windows[: step + 1], topology, current=current, dispatch="batch", tokens_per_step=size * TOP_K
        )
        moves.append(current.diff(new).moves.sum() / (windows.shape[1] * topology.num_slots))
        current = new
        if step == half - 1:
            judged = new
    later = topk[half * WINDOW :]
    row = {scope: later_steps(judged, later, per_rank, scope, quick) for scope in ("all", "node", "rank")}
    return row | {"first": float(moves[0]), "later": float(np.mean(moves[1:]))}


def later_steps(plan: ExpertLocationMetadata, tokens: np.ndarray, per_rank: int, scope: str, quick: bool) -> float:
    """Balancedness of steps of ``per_rank`` tokens a rank, dealt out in turns, with shares solved in ``scope``."""
    ranks = plan.topology.num_ranks
    size = per_rank * ranks
    scorer = DispatchScorer(plan, "batch", DispatchPolicy("batch", scope))  # type: ignore[arg-type]
    firsts = range(0, max(len(tokens) - size, 0) + 1, size)
    found = []
    for number, first in enumerate(list(firsts)[: 1 if quick else 4]):
        counts = counts_by_source(
            np.resize(tokens[first : first + size], (size, *tokens.shape[1:])), ranks, NUM_EXPERTS
        )
        found.append(scorer.step(counts, step=number).balancedness().mean())
    return float(np.mean(found))


def frontier(topk: np.ndarray, topology: EpTopology, quick: bool) -> dict[str, dict[str, float]]:
    """Balance of the next window, as each kind of dispatch splits it, against moves; by price of a move."""
    windows = windows_of(topk)
    rows = {}
    for dispatch in DISPATCH_KINDS:
        for price in PRICES[1:2] if quick else PRICES:
            current = rebalance_experts(windows[0], topology, algorithm="deepseek")
            moves, balance = [], []
            for step in range(1, len(windows) - 1):
                new = rebalance_experts(
                    windows[max(0, step - 7) : step + 1],
                    topology,
                    current=current,
                    dispatch=dispatch,
                    move_price=price,
                    tokens_per_step=WINDOW * TOP_K if dispatch == "batch" else None,
                )
                moves.append(current.diff(new).moves.sum() / (windows.shape[1] * topology.num_slots))
                current = new
                balance.append(next_window(new, windows[step + 1], dispatch))
            rows[f"{dispatch}, price {price:g}"] = {
                "balancedness": float(np.mean(balance)),
                "moves": float(np.mean(moves)),
            }
    return rows


def next_window(plan: ExpertLocationMetadata, window: np.ndarray, dispatch: str) -> float:
    if dispatch != "batch":
        return mean_balancedness(balancedness(window, plan))
    counts = np.zeros((plan.topology.num_ranks, *window.shape), dtype=np.int64)
    counts[:] = window // plan.topology.num_ranks
    rest = (window - counts.sum(0)).astype(np.int64)
    counts += np.arange(len(counts))[:, None, None] < rest
    scorer = DispatchScorer(plan, "batch", DispatchPolicy("batch", "all"))
    return float(scorer.step(counts).balancedness().mean())
