"""How long forward passes wait for a rebalance: the embedded engine under steady load, in each transfer mode.

    python benchmark/engine_stall.py --json out/engine_stall.json

One model with random weights, several ranks on this machine, a steady number of requests decoding. After a while one
rebalance moves experts of every layer. Measured on rank 0, step by step: the longest step, p99, and the time that
balancing added between two forward passes.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

import equipoise.demo_model
from cpu import cpu_name
from equipoise.commands import GetSteps, Rebalance, RebalanceReport, StepRecord
from equipoise.config import EngineConfig, EplbConfig, ServeConfig
from equipoise.engine import Engine, GenerateRequest, SamplingParams

MODES = ("sync", "chunked", "async")


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
    AutoTokenizer.from_pretrained(equipoise.demo_model.path()).save_pretrained(folder)
    return 3 * hidden * intermediate * 4


class SteadyLoad:
    """So many requests at any time; a new one as soon as one ends."""

    def __init__(self, engine: Engine, requests: int) -> None:
        self._engine = engine
        self._numbers = itertools.count()
        self._stopped = False
        self._tasks = [asyncio.create_task(self._client(seed)) for seed in range(requests)]

    async def _client(self, seed: int) -> None:
        prompt = tuple((seed * 37 + i * 11) % 256 for i in range(16))
        while not self._stopped:
            request = GenerateRequest(
                f"r{next(self._numbers)}", prompt, SamplingParams(max_new_tokens=64, temperature=0, ignore_eos=True)
            )
            async for _ in self._engine.generate(request):
                pass

    async def stop(self) -> None:
        self._stopped = True
        await asyncio.gather(*self._tasks)


async def measure(engine: Engine, requests: int, steps: int) -> tuple[list[StepRecord], int, RebalanceReport]:
    """Steps of the run, the step at which the rebalance was asked for, and its report."""
    load = SteadyLoad(engine, requests)

    async def after(count: int) -> int:
        done: list[StepRecord] = await engine.control(GetSteps())
        target = (done[-1].forward_pass_id if done else 0) + count
        while not done or done[-1].forward_pass_id < target:
            await asyncio.sleep(0.1)
            done = await engine.control(GetSteps())
        return done[-1].forward_pass_id

    await after(30)  # warm
    asked = await after(steps)
    report: RebalanceReport = await engine.control(Rebalance(algorithm="deepseek", force=True))
    await after(steps // 2)
    found: list[StepRecord] = await engine.control(GetSteps())
    await load.stop()
    return [step for step in found if step.forward_pass_id > asked - steps], asked, report


def summary(steps: list[StepRecord], asked: int, report: RebalanceReport) -> dict[str, Any]:
    """Milliseconds; ``during`` is from the request to the last commit."""
    before = np.array([s.seconds for s in steps if s.forward_pass_id <= asked]) * 1e3
    during = np.array([s.seconds for s in steps if asked < s.forward_pass_id <= report.forward_pass_id]) * 1e3
    return {
        "outcome": report.outcome,
        "experts_moved": sum(report.moves),
        "layers_moved": sum(count > 0 for count in report.moves),
        "bytes_moved": report.bytes_moved,
        "steps_before": len(before),
        "steps_during": len(during),
        "p50_before_ms": float(np.percentile(before, 50)),
        "p99_before_ms": float(np.percentile(before, 99)),
        "longest_before_ms": float(before.max()),
        "p50_during_ms": float(np.percentile(during, 50)),
        "p99_during_ms": float(np.percentile(during, 99)),
        "longest_during_ms": float(during.max()),
        "stall_ms": 1e3 * report.stall_seconds,
        "planning_ms": 1e3 * report.planning_seconds,
        "transfer_ms": 1e3 * report.transfer_seconds,
        "peak_staging_bytes": report.profile.peak_staging_bytes,
    }


def run_mode(mode: str, folder: Path, arguments: argparse.Namespace) -> tuple[dict[str, Any], RebalanceReport]:
    config = ServeConfig(
        EngineConfig(model_path=str(folder), ep_size=arguments.ranks, nnodes=2, max_model_len=128),
        EplbConfig(
            eplb_transfer_mode=mode,  # type: ignore[arg-type]
            eplb_transfer_duty=arguments.duty,
            ep_num_redundant_experts=arguments.redundant,
            eplb_rebalance_num_iterations=200,
            profile=arguments.profile,
        ),
    )
    engine = Engine.launch(config, on_progress=lambda line: print(line, flush=True) if arguments.profile else None)
    try:
        steps, asked, report = asyncio.run(measure(engine, arguments.requests, arguments.steps))
        return summary(steps, asked, report), report
    finally:
        engine.close()


def show(results: dict[str, dict[str, Any]], console: Console) -> None:
    table = Table(title="steps of the embedded engine around one rebalance of all layers", title_justify="left")
    for name in ("mode", "p50 before", "p99 before", "p99 during", "longest", "waited in all", "steps", "moved"):
        table.add_column(name, justify="right")
    for mode, row in results.items():
        times = ("p50_before_ms", "p99_before_ms", "p99_during_ms", "longest_during_ms", "stall_ms")
        moved = f"{row['experts_moved']} experts, {row['bytes_moved'] / 1e6:.0f} MB"
        table.add_row(mode, *(f"{row[name]:.0f} ms" for name in times), str(row["steps_during"]), moved)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--experts", type=int, default=28, help="logical experts")
    parser.add_argument("--redundant", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1376)
    parser.add_argument("--requests", type=int, default=2, help="decoding at any time")
    parser.add_argument("--steps", type=int, default=100, help="measured before the rebalance")
    parser.add_argument("--duty", type=float, default=0.2, help="share of the time for background transfers")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--profile", action="store_true", help="print where the time of each rebalance went")
    parser.add_argument("--json", type=Path, default=Path("out/engine_stall.json"))
    arguments = parser.parse_args()
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
            results[mode], report = run_mode(mode, folder, arguments)
            console.print(f"{mode}: {report.outcome}" + (f": {report.error}" if report.error else ""))
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
