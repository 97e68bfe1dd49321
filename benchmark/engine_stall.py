"""How long forward passes wait for a rebalance: the embedded engine under steady load, in each transfer mode.

    python benchmark/engine_stall.py --json out/engine_stall.json

One model with random weights, several ranks on this machine, a steady number of requests decoding. Every so often their
text changes, and a rebalance moves experts of every layer. Measured on rank 0, step by step: the longest step, p99, and
the time that balancing added between two forward passes; medians over the rebalances, since other work on a machine
stretches single steps by more than any of this.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

import equipoise.engine.demo_model
from cpu import cpu_name
from equipoise.config import EngineConfig, EplbConfig, ServeConfig
from equipoise.engine.engine import Engine
from equipoise.engine.requests import GenerateRequest, SamplingParams
from equipoise.engine.step_log import GetSteps, StepRecord
from equipoise.manager.commands import Rebalance
from equipoise.manager.reports import RebalanceReport

MODES = ("sync", "chunked", "async")
QUICK = {"layers": 2, "experts": 12, "hidden": 128, "intermediate": 256, "steps": 40, "repeats": 1}


def make_model(folder: Path, *, layers: int, experts: int, hidden: int, intermediate: int) -> int:
    """Saves a Qwen3-MoE with random weights; returns the bytes of one expert (float32)."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=hidden,
        moe_intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        num_experts=experts,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
    )
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_(std=0.1)  # routing as uneven as that of a trained router
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(equipoise.engine.demo_model.path()).save_pretrained(folder)
    return 3 * hidden * intermediate * 4


class SteadyLoad:
    """So many requests at any time; a new one as soon as one ends. ``topic`` decides on their text."""

    def __init__(self, engine: Engine, requests: int) -> None:
        self._engine = engine
        self._numbers = itertools.count()
        self._stopped = False
        self.topic = 0
        self._tasks = [asyncio.create_task(self._client()) for _ in range(requests)]

    async def _client(self) -> None:
        while not self._stopped:
            number = next(self._numbers)
            prompt = tuple(self.topic * 30 + (number * 7 + i * 11) % 30 for i in range(4))
            request = GenerateRequest(
                f"r{number}", prompt, SamplingParams(max_new_tokens=16, temperature=0, ignore_eos=True)
            )
            async for _ in self._engine.generate(request):
                pass

    async def stop(self) -> None:
        self._stopped = True
        await asyncio.gather(*self._tasks)


@dataclass(frozen=True)
class Rebalanced:
    """One rebalance and the steps around it, in seconds."""

    report: RebalanceReport
    before: list[float]
    during: list[float]  # from the request to the last commit


async def measure(engine: Engine, requests: int, steps: int, repeats: int) -> list[Rebalanced]:
    """``repeats`` rebalances, ``steps`` apart, each after a change of the load."""
    load = SteadyLoad(engine, requests)

    last = 0

    async def after(count: int) -> int:
        nonlocal last
        target = last + count
        while last < target:
            await asyncio.sleep(0.1)
            for step in await engine.control(GetSteps(since=last + 1)):
                last = step.forward_pass_id
        return last

    await after(30)  # warm
    found = []
    for load.topic in range(repeats):
        asked = await after(steps)
        report: RebalanceReport = await engine.control(Rebalance(algorithm="deepseek", force=True, window_steps=steps))
        await after(5)
        records: list[StepRecord] = await engine.control(GetSteps(since=asked - steps + 1))
        before = [s.seconds for s in records if s.forward_pass_id <= asked]
        during = [s.seconds for s in records if asked < s.forward_pass_id <= report.forward_pass_id]
        found.append(Rebalanced(report, before, during))
    await load.stop()
    return found


def summary(found: list[Rebalanced]) -> dict[str, Any]:
    """Milliseconds. Percentiles are over the steps of all rebalances, the rest are medians of the rebalances."""
    before = 1e3 * np.concatenate([each.before for each in found])
    during = 1e3 * np.concatenate([each.during for each in found])
    reports = [each.report for each in found]
    return {
        "outcomes": [report.outcome for report in reports],
        "experts_moved": median(sum(report.moves) for report in reports),
        "layers_moved": median(sum(count > 0 for count in report.moves) for report in reports),
        "bytes_moved": median(report.bytes_moved for report in reports),
        "steps_before": len(before),
        "steps_during": len(during),
        "p50_before_ms": float(np.percentile(before, 50)),
        "p99_before_ms": float(np.percentile(before, 99)),
        "longest_before_ms": 1e3 * median(max(each.before) for each in found),
        "p50_during_ms": float(np.percentile(during, 50)),
        "p99_during_ms": float(np.percentile(during, 99)),
        "longest_during_ms": 1e3 * median(max(each.during) for each in found),
        "stall_ms": 1e3 * median(report.stall_seconds for report in reports),
        "stall_ms_of_each": [1e3 * report.stall_seconds for report in reports],
        "planning_ms": 1e3 * median(report.planning_seconds for report in reports),
        "transfer_ms": 1e3 * median(report.transfer_seconds for report in reports),
        "peak_staging_bytes": max(report.profile.peak_staging_bytes for report in reports),
    }


def run_mode(mode: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    config = ServeConfig(
        EngineConfig(
            model_path=str(folder),
            ep_size=arguments.ranks,
            nnodes=2,
            max_model_len=128,
            log_level="info" if arguments.profile else "warning",
        ),
        EplbConfig(
            eplb_transfer_mode=mode,  # type: ignore[arg-type]
            eplb_transfer_duty=arguments.duty,
            ep_num_redundant_experts=arguments.redundant,
            eplb_rebalance_num_iterations=1000,
            eplb_profile=arguments.profile,
        ),
    )
    engine = Engine.launch(config)
    try:
        return summary(asyncio.run(measure(engine, arguments.requests, arguments.steps, arguments.repeats)))
    finally:
        engine.close()


def show(results: dict[str, dict[str, Any]], console: Console) -> None:
    table = Table(title="steps of the embedded engine around rebalances of all layers", title_justify="left")
    for name in ("mode", "p50 before", "p99 before", "p99 during", "longest", "waited in all", "moved by each"):
        table.add_column(name, justify="right")
    for mode, row in results.items():
        times = ("p50_before_ms", "p99_before_ms", "p99_during_ms", "longest_during_ms", "stall_ms")
        moved = f"{row['experts_moved']:.0f} experts, {row['bytes_moved'] / 1e6:.0f} MB"
        table.add_row(mode, *(f"{row[name]:.0f} ms" for name in times), moved)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=60, help="logical experts")
    parser.add_argument("--redundant", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=1376)
    parser.add_argument("--requests", type=int, default=2, help="decoding at any time")
    parser.add_argument("--steps", type=int, default=80, help="measured before each rebalance")
    parser.add_argument("--repeats", type=int, default=7, help="rebalances in each mode")
    parser.add_argument("--duty", type=float, default=0.2, help="share of the time for background transfers")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--profile", action="store_true", help="print where the time of each rebalance went")
    parser.add_argument("--quick", action="store_true", help="a small model, one rebalance a mode: shows that it runs")
    parser.add_argument("--json", type=Path, default=Path("out/engine_stall.json"))
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(QUICK)
    console = Console(width=120)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        size = make_model(
            folder,
            layers=arguments.layers,
            experts=arguments.experts,
            hidden=arguments.hidden,
            intermediate=arguments.intermediate,
        )
        slots = (arguments.experts + arguments.redundant) // arguments.ranks
        console.print(
            f"{cpu_name()}: {arguments.layers} layers, {slots} slots a rank of {size / 2**20:.1f} MiB: "
            f"{slots * size / 2**20:.0f} MiB of experts a layer and rank, {arguments.ranks} ranks"
        )
        for mode in arguments.modes:
            results[mode] = run_mode(mode, folder, arguments)
            console.print(f"{mode}: rebalances {', '.join(results[mode]['outcomes'])}")
    show(results, console)
    ratios: dict[str, float] = {}
    if {"sync", "async"} <= results.keys():
        sync, beside = results["sync"], results["async"]
        ratios = {
            "longest step, async / sync": beside["longest_during_ms"] / sync["longest_during_ms"],
            "p99 of async, during / before": beside["p99_during_ms"] / beside["p99_before_ms"],
            "waited in all, async / sync": beside["stall_ms"] / sync["stall_ms"],
        }
        for label, ratio in ratios.items():
            console.print(f"{label}: {ratio:.3f}")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    options = {name: value for name, value in vars(arguments).items() if name != "json"}
    document = {
        "benchmark": "engine_stall",
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "options": options,
        "results": results,
        "ratios": ratios,
    }
    arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    console.print(f"wrote {arguments.json}")


if __name__ == "__main__":
    main()
