"""Moves real tensors between gloo ranks on simulated nodes: Equipoise against SGLang's and vLLM's own code.

Same maps, same tensors, same run. Each system moves every layer from placement A to B and back; the systems take turns,
so that a busy machine is as unfair to one as to another. Every slot's bytes are compared with the oracle afterwards.

    make bench-transfer ARGS="--cache /path/for/wheels --json out/transfer.json"

A neighbour whose package cannot be had is left out, with the reason.

Reported per system, medians over repeats:

- seconds: from a barrier to the last rank's end, planning included, all layers;
- cross-node bytes: sent over node boundaries, all ranks together;
- busiest link: most bytes that one rank sends, or receives; and the same of what crosses nodes;
- rounds: all layers, if a rank's link carries one expert at a time each way (see link_rounds.py);
- peak staging: bytes that a rank holds beside the live weights.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "test")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

import neighbours  # noqa: E402
import transfer_planning  # noqa: E402
from cpu import cpu_name  # noqa: E402
from equipoise.algorithms.rebalance import rebalance_experts  # noqa: E402
from equipoise.topology import EpTopology  # noqa: E402
from helpers.placements import live_weights  # noqa: E402
from helpers.run_ranks import run_ranks  # noqa: E402
from link_rounds import count_rounds  # noqa: E402
from transfer_systems import EquipoiseMover, Message, Mover, SglangMover, VllmMover, Weights  # noqa: E402

DEFAULT_STAGED_EXPERTS = 4  # of the updater: one for each round in flight
QUICK = {"num_ranks": 4, "num_layers": 2, "num_logical_experts": 36, "hidden_size": 256, "repeats": 1}


@dataclass(frozen=True)
class Setting:
    num_ranks: int
    num_nodes: int
    slots_per_rank: int
    num_logical_experts: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    staged_experts: int
    rounds_in_flight: int
    repeats: int
    seed: int

    @property
    def topology(self) -> EpTopology:
        return EpTopology(self.num_ranks, self.num_nodes, self.slots_per_rank)


def placements(setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """Before and after, (L, P) each: the placements of DeepSeek's algorithm for a skewed load and for a shifted one."""
    rng = np.random.default_rng(setting.seed)
    shape = (setting.num_layers, setting.num_logical_experts)
    load = rng.zipf(1.3, shape).clip(max=1000).astype(float) * 100
    shifted = 0.5 * load + 0.5 * rng.permuted(load, axis=1)
    maps = [
        rebalance_experts(each, setting.topology, algorithm="deepseek").physical_to_logical_map.numpy()
        for each in (load, shifted)
    ]
    return maps[0], maps[1]


def expert_tensors(layer: int, expert: int, setting: Setting) -> list[torch.Tensor]:
    """bf16 gate-up and down projections, and a float32 scale: enough bytes to tell every expert from every other."""
    hidden, inner = setting.hidden_size, setting.intermediate_size
    mark = torch.tensor(layer * 4096 + expert, dtype=torch.int64)
    up = torch.arange(2 * inner * hidden, dtype=torch.int64).add_(mark * 7919).remainder_(32749).to(torch.int16)
    down = torch.arange(hidden * inner, dtype=torch.int64).add_(mark * 104729).remainder_(32749).to(torch.int16)
    scale = torch.full((2 * inner // 128 + 1,), float(mark))
    return [
        up.view(torch.bfloat16).reshape(2 * inner, hidden),
        down.view(torch.bfloat16).reshape(hidden, inner),
        scale,
    ]


def local_weights(p2l: np.ndarray, rank: int, setting: Setting) -> Weights:
    slots = setting.topology.slots_of_rank(rank)
    weights = []
    for layer, row in enumerate(p2l):
        experts = [expert_tensors(layer, int(expert), setting) for expert in row[slots.start : slots.stop]]
        weights.append([torch.stack(tensors) for tensors in zip(*experts, strict=True)])
    return weights


def is_in_place(weights: Weights, p2l: np.ndarray, rank: int, setting: Setting) -> bool:
    slots = setting.topology.slots_of_rank(rank)
    for layer, tensors in enumerate(weights):
        for local, expert in enumerate(p2l[layer, slots.start : slots.stop].tolist()):
            for tensor, expected in zip(tensors, expert_tensors(layer, expert, setting), strict=True):
                if not torch.equal(tensor[local].view(torch.uint8), expected.view(torch.uint8)):
                    return False
    return True


def on_rank(rank: int, _world_size: int, setting: Setting, cache: Path, others: frozenset[str]) -> dict[str, Any]:
    """Runs ours and the ``others``; returns per system this rank's seconds, and the messages of one migration."""
    before, after = placements(setting)
    topology = setting.topology
    movers: list[Mover] = []

    def add(make: Callable[[Weights], Mover]) -> None:
        movers.append(make(local_weights(before, rank, setting)))  # each its own: they end with different slot orders

    many, few = setting.staged_experts, DEFAULT_STAGED_EXPERTS
    for aligned, shared_rows, verification, staged in (
        (True, True, "canary", few),
        (True, False, "canary", many),
        (True, False, "canary", few),
        (True, False, "checksum", many),
        (False, False, "canary", many),
    ):
        add(
            lambda weights, v=verification, a=aligned, r=shared_rows, s=staged: EquipoiseMover(
                topology,
                weights,
                before,
                verification=v,
                aligned=a,
                shared_rows=r,
                staged_experts=s,
                rounds_in_flight=setting.rounds_in_flight,
            )
        )
    if "sglang" in others:
        add(lambda weights: SglangMover(topology, weights, before, cache))
    for batching in (False, True) if "vllm" in others else ():
        add(lambda weights, b=batching: VllmMover(topology, weights, before, cache, batching=b))
    results: dict[str, Any] = {mover.name: {"seconds": []} for mover in movers}
    for mover in movers:  # untimed: connections, page faults, compiled kernels; and what is posted
        messages: list[Message] = []
        stop = mover.record(messages)
        reached = mover.migrate(after)
        stop()
        in_place = is_in_place(live_weights(mover.weights), reached, rank, setting)
        assert in_place, f"{mover.name}: wrong bytes, rank {rank}"
        mover.migrate(before)
        results[mover.name]["messages"] = [asdict(message) for message in messages]
        results[mover.name]["staging_bytes"] = mover.staging_bytes()
    for repeat in range(setting.repeats):
        for mover in movers[repeat % len(movers) :] + movers[: repeat % len(movers)]:
            for target in (after, before):
                dist.barrier()
                start = time.perf_counter()
                reached = mover.migrate(target)
                results[mover.name]["seconds"].append(time.perf_counter() - start)
            if repeat == setting.repeats - 1:
                in_place = is_in_place(live_weights(mover.weights), reached, rank, setting)
                assert in_place, f"{mover.name}: wrong bytes, rank {rank}"
    return results


def summarise(per_rank: list[dict[str, Any]], setting: Setting) -> dict[str, dict[str, float]]:
    topology = setting.topology
    tensors_per_expert = len(expert_tensors(0, 0, setting))  # ours sends as many: two large ones and the packed rest
    summary = {}
    for name in per_rank[0]:
        ranks = [each[name] for each in per_rank]
        seconds = [max(times) for times in zip(*(each["seconds"] for each in ranks), strict=True)]
        traffic = [rank_traffic(each["messages"], rank, topology) for rank, each in enumerate(ranks)]
        summary[name] = {
            "seconds": statistics.median(seconds),
            "seconds_min": min(seconds),
            "seconds_max": max(seconds),
            "cross_node_bytes": sum(each["sent across"] for each in traffic),
            "busiest_link_bytes": max(max(each["sent"], each["received"]) for each in traffic),
            "busiest_cross_node_link_bytes": max(max(each["sent across"], each["received across"]) for each in traffic),
            "rounds": count_rounds([each["messages"] for each in ranks], tensors_per_expert),
            "peak_staging_bytes": max(each["staging_bytes"] for each in ranks),
        }
    return summary


def rank_traffic(messages: list[dict[str, Any]], rank: int, topology: EpTopology) -> dict[str, int]:
    """Bytes that a rank sends and receives, in all and over its node's boundary."""
    total = {"sent": 0, "received": 0, "sent across": 0, "received across": 0}
    for message in messages:
        way = "sent" if message["sent"] else "received"
        total[way] += message["num_bytes"]
        if not topology.same_node(rank, message["peer"]):
            total[f"{way} across"] += message["num_bytes"]
    return total


def show(summary: dict[str, dict[str, float]], console: Console) -> None:
    table = Table()
    for name in (
        "system",
        "seconds",
        "cross-node MiB",
        "busiest link MiB",
        "of it cross-node",
        "rounds",
        "staging MiB",
    ):
        table.add_column(name, justify="left" if name == "system" else "right", no_wrap=name == "system")
    for name, row in summary.items():
        table.add_row(
            name,
            f"{row['seconds']:.3f}",
            f"{row['cross_node_bytes'] / 2**20:.1f}",
            f"{row['busiest_link_bytes'] / 2**20:.1f}",
            f"{row['busiest_cross_node_link_bytes'] / 2**20:.1f}",
            f"{row['rounds']}",
            f"{row['peak_staging_bytes'] / 2**20:.1f}",
        )
    console.print(table)


def ratios(summary: dict[str, dict[str, float]]) -> dict[str, dict[str, dict[str, float]]]:
    """Each of ours over each of the others: below 1 is ahead."""
    ours = {name: row for name, row in summary.items() if name.startswith("equipoise")}
    return {
        name: {
            other: {key: value / row[key] for key, value in mine.items() if not key.startswith("seconds_")}
            for other, row in summary.items()
            if other not in ours
        }
        for name, mine in ours.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=HERE.parent / "out" / "wheels", help="where the wheels are kept")
    parser.add_argument("--json", type=Path, default=None, help="write the results here")
    parser.add_argument("--quick", action="store_true", help="4 ranks, small experts, once: shows that it runs")
    parser.add_argument("--num-ranks", type=int, default=8)
    parser.add_argument("--num-nodes", type=int, default=2)
    parser.add_argument("--slots-per-rank", type=int, default=12)
    parser.add_argument("--num-logical-experts", type=int, default=72)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=1536)
    parser.add_argument("--intermediate-size", type=int, default=512)
    parser.add_argument("--staged-experts", type=int, default=8, help="experts that Equipoise may stage per rank")
    parser.add_argument("--rounds-in-flight", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    cache, json_path = options.pop("cache").resolve(), options.pop("json")
    if options.pop("quick"):
        options |= QUICK
    setting = Setting(**options)
    console = Console(width=120)
    others = set()
    for name, package in (("sglang", neighbours.SGLANG), ("vllm", neighbours.VLLM)):
        try:
            package.fetch(cache)
            others.add(name)
        except neighbours.Unavailable as error:
            console.print(f"[yellow]left out:[/] {error}")
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # it needs a process group of its own kind
        planning = pool.apply(transfer_planning.measure, (cache if "sglang" in others else None,))
    console.print(transfer_planning.summary(planning))
    per_rank = run_ranks(on_rank, setting.num_ranks, setting, cache, frozenset(others), timeout=1200, group_timeout=300)
    summary = summarise(per_rank, setting)
    show(summary, console)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        result = {"setting": asdict(setting), "cpu": cpu_name(), "torch": torch.__version__}
        result |= {"planning": planning, "systems": summary, "ratios": ratios(summary)}
        json_path.write_text(json.dumps(result, indent=1) + "\n")
        console.print(f"written to {json_path}")


if __name__ == "__main__":
    main()
