"""What dispatch costs a step: `make bench-dispatch`.

One layer of DeepSeek-V3's shape: 256 experts in 288 slots on 32 ranks, top-8. On the CPU, the time of its dispatch,
median of several, by kind and tokens a rank; where a GPU is, CUDA events there, against a plain copy of the ids. The
number of steps of the solve that follow one another is printed either way. Then the embedded engine on the CPU: what
dispatch and recording add to its steps (dispatch_engine.py).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cpu import cpu_name
from dispatch_engine import engine_overhead, overhead_bars
from equipoise.algorithms.rebalance import rebalance_experts
from equipoise.dispatch.dispatcher import ExpertDispatcher
from equipoise.dispatch.policy import DispatchPolicy
from equipoise.dispatch.solver.table_builder import NUM_COLOURS, NUM_ROWS
from equipoise.dispatch.tables import DispatchTables
from equipoise.topology import EpTopology

TOPOLOGY, NUM_EXPERTS, TOP_K = EpTopology(32, 4, 9), 256, 8
KINDS = {
    "static": DispatchPolicy("static"),
    "dynamic": DispatchPolicy("dynamic"),
    "batch": DispatchPolicy("batch"),
    "batch, experts cost": DispatchPolicy("batch", active_expert_cost=300.0),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    arguments = parser.parse_args()
    console = Console(width=120)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rng = np.random.default_rng(0)
    popularity = np.exp(rng.normal(0, 1, (1, NUM_EXPERTS)))
    metadata = rebalance_experts(popularity * 1000, TOPOLOGY).clone(device)
    sizes = DispatchTables(metadata).layer(0).sizes.tolist()
    policy = KINDS["batch"]
    steps = policy.iterations + policy.sweeps * sizes[NUM_COLOURS]
    console.print(
        f"{sizes[NUM_ROWS]} replicated experts: {policy.iterations} steps + {policy.sweeps} sweep of "
        f"{sizes[NUM_COLOURS]} colours = {steps} steps that follow one another"
    )
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{cpu_name()} (no GPU here: CPU part alone)"
    table = Table("tokens a rank", "copy of the ids", *KINDS, title=f"one layer, microseconds, on {where}")
    report: dict[str, dict[str, float]] = {}
    for tokens in (1, 64, 4096) if arguments.quick else (1, 16, 64, 256, 1024, 4096, 16384):
        share = popularity[0] / popularity[0].sum()
        ids = torch.from_numpy(rng.choice(NUM_EXPERTS, (tokens, TOP_K), p=share)).to(device)
        times = {"copy of the ids": microseconds(ids.clone, device, arguments.quick)}
        for name, kind in KINDS.items():
            dispatcher = ExpertDispatcher(metadata, rank=0, policy=kind)
            times[name] = microseconds(lambda d=dispatcher, i=ids: d.dispatch(0, i), device, arguments.quick)
        report[str(tokens)] = times
        table.add_row(str(tokens), *(f"{value:.1f}" for value in times.values()))
    console.print(table)
    engine = engine_overhead(arguments.quick)
    steps_table = Table(
        "step",
        "off, ms",
        "dispatch",
        "and recording",
        "±",
        "on CPU",
        "±",
        "inside",
        "streaming",
        "inside",
        title="embedded engine, added to a step",
    )
    for kind, values in engine.items():
        shown = ("dispatch adds", "dispatch and recording add", "standard error", "CPU", "standard error of CPU")
        parts = (values[n] for n in (*shown, "inside dispatch and recording", "streaming adds", "inside streaming"))
        steps_table.add_row(kind, f"{values['off']:.2f}", *(f"{100 * part:.1f}%" for part in parts))
    console.print(steps_table)

    def bar(name: str, measured: float, limit: float) -> None:
        word = "met" if measured <= limit else "MISSED"
        console.print(f"{word:7} {name}: {100 * measured:.1f}% (at most {100 * limit:g}%)")

    overhead_bars(engine, bar)
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = {"device": where, "sequential_steps": steps, "microseconds": report, "engine": engine}
    (arguments.out / "dispatch.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


def microseconds(call: Callable[[], object], device: torch.device, quick: bool) -> float:
    """Median of several calls, after some that compile and warm up."""
    taken = []
    for repeat in range(20 if quick else 200):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            seconds = start.elapsed_time(end) / 1e3
        else:
            began = time.perf_counter()
            call()
            seconds = time.perf_counter() - began
        if repeat >= 5:
            taken.append(seconds)
    return 1e6 * median(taken)


if __name__ == "__main__":
    raise SystemExit(main())
