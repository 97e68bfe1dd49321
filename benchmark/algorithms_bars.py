"""The bars that the default algorithm is held to, each measured in the run at hand."""

from __future__ import annotations

from typing import Any

import numpy as np

DEFAULT = "equipoise"


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
    real = {name: row for name, row in runs.items() if row["kind"] == "real"}
    drift = {name: row for name, row in runs.items() if row["kind"] == "synthetic"}

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
    # Mixed traffic is shown beside the bars, which speak of these two kinds.
    for rows, where in ((real | drift, ""), (real, ", real traces alone")):
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
    bar("6 cold compile until a first plan, seconds", seconds["cold compile, first plan"], 10.0, False)
    bar("6 warm start, seconds", seconds["warm start"], 0.5, False)
    return result
