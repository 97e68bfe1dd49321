"""From a comparison to a recommendation: which options, why, and the launch flags for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from equipoise.replay.grid import TIMER, Played
from equipoise.replay.views.table import nothing_of

WORTH_IT = 0.005
"""Least gain of tokens a second for which anything is recommended: below it, the cost model is not to be trusted."""

_SLOT_MARGIN = 0.003
"""Gain that a larger redundancy must bring: its slots take memory from the KV cache."""

_INTERVAL_MARGIN = 0.001


@dataclass(frozen=True)
class Advice:
    """What to do.

    Attributes:
        row: the recommended row of the comparison; None: leave it as it is.
        nothing: the row to which it is compared.
        gain: more tokens a second, as a fraction.
        gpus: GPUs that the gain is worth at this size.
    """

    row: dict[str, Any] | None
    nothing: dict[str, Any]
    gain: float
    gpus: float
    reasons: tuple[str, ...]


def advise(played: Sequence[Played], num_ranks: int) -> Advice:
    """The best row; of rows that are as good, the one with fewer slots, then the one that rebalances less often."""
    nothing = nothing_of(played)
    base = nothing["tokens_per_second"]
    rows = [entry.row for entry in played if entry.row is not None and entry.row["kind"] == "live"]
    best = max(rows, key=lambda row: row["tokens_per_second"], default=None)
    if best is None or best["tokens_per_second"] / base - 1 < WORTH_IT:
        best_gain = 0.0 if best is None else best["tokens_per_second"] / base - 1
        return Advice(
            None, nothing, best_gain, 0.0,
            (f"no combination gains {WORTH_IT:.1%} or more (best {best_gain:+.2%}): balancing would not pay here",),
        )  # fmt: skip
    top = best["tokens_per_second"]
    enough = [row for row in rows if row["tokens_per_second"] >= top * (1 - _SLOT_MARGIN)]
    fewest = min(row["num_redundant_experts"] for row in enough)
    enough = [row for row in enough if row["num_redundant_experts"] == fewest]
    near = max(row["tokens_per_second"] for row in enough) * (1 - _INTERVAL_MARGIN)
    chosen = max(
        (row for row in enough if row["tokens_per_second"] >= near),
        key=lambda row: (row["interval"], row["tokens_per_second"]),
    )
    gain = chosen["tokens_per_second"] / base - 1
    return Advice(chosen, nothing, gain, gain * num_ranks, _reasons(chosen, rows, played, base))


def _reasons(
    chosen: dict[str, Any], rows: Sequence[dict[str, Any]], played: Sequence[Played], base: float
) -> tuple[str, ...]:
    def gain(row: dict[str, Any]) -> str:
        return f"{row['tokens_per_second'] / base - 1:+.1%}"

    def best(**wanted: Any) -> dict[str, Any] | None:
        found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
        return max(found, key=lambda row: row["tokens_per_second"], default=None)

    said = []
    for name, key, unit in (
        ("redundant experts", "num_redundant_experts", ""),
        ("interval", "interval", " steps"),
        ("dispatch", "dispatch", ""),
        ("algorithm", "algorithm", ""),
    ):
        values = sorted({row[key] for row in rows})
        if len(values) > 1:
            each = [(value, best(**{key: value})) for value in values]
            told = ", ".join(f"{value}{unit} {gain(row)}" for value, row in each if row is not None)
            said.append(f"{name}: {chosen[key]}{unit} (best with each: {told})")
    timers = [entry.row for entry in played if entry.row is not None and entry.row["kind"] == TIMER]
    if timers:
        timer = max(timers, key=lambda row: row["tokens_per_second"])
        said.append(f"DeepSeek's algorithm on a timer, as stock engines run it: {gain(timer)}")
    return tuple(said)


def launch_flags(row: dict[str, Any], engine: str) -> str:
    """The flags that start an engine as a row was played."""
    topology, redundant, interval = row["topology"], row["num_redundant_experts"], row["interval"]
    ranks, nodes = topology["num_ranks"], topology["num_nodes"]
    if engine == "equipoise":
        return (
            f"equipoise serve --model-path MODEL --ep-size {ranks} --nnodes {nodes} "
            f"--ep-num-redundant-experts {redundant} --enable-eplb --eplb-algorithm {row['algorithm']} "
            f"--eplb-rebalance-num-iterations {interval} --ep-dispatch-algorithm "
            + ("batch --ep-dispatch-active-expert-cost auto" if row["dispatch"] == "batch" else "dynamic")
        )
    if engine == "sglang":
        return (
            f"sglang serve --model-path MODEL --tp-size {ranks} --ep-size {ranks} --nnodes {nodes} "
            f"--ep-num-redundant-experts {redundant} --enable-eplb --eplb-rebalance-num-iterations {interval} "
            "--ep-dispatch-algorithm dynamic"
        )
    config = {"num_redundant_experts": redundant, "window_size": interval, "step_interval": interval}
    return (
        f"vllm serve MODEL --data-parallel-size {ranks} --enable-expert-parallel --enable-eplb "
        f"--eplb-config '{json.dumps(config)}'"
    )


def flag_notes(row: dict[str, Any], engine: str) -> tuple[str, ...]:
    """What the engine does not do as it was played."""
    notes = []
    if engine == "sglang":
        notes.append("plan and move with Equipoise: install it beside SGLang, its plugin takes over (docs)")
    if engine == "vllm":
        notes.append("stock vLLM plans with DeepSeek's algorithm on a timer: expect that row's gain, not this one's")
    if engine != "equipoise" and row["dispatch"] != "even" and row["num_redundant_experts"]:
        notes.append("without Equipoise's dispatch replicas share tokens alike: expect the row with dispatch even")
    return tuple(notes)
