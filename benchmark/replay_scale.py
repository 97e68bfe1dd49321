"""How long a replay of the live loop takes, and how much memory, by size: `make bench-replay`.

Up to 512 ranks, 1024 experts, 64 layers and 1000 steps. Each size runs in a process of its own, which makes a synthetic
trace on disk, opens it as a recording and plays it with Equipoise's algorithm; seconds are of the replay alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cpu import cpu_name

SIZES = (  # ranks, experts, redundant experts, layers, steps
    (8, 64, 8, 26, 1000),
    (32, 256, 32, 58, 1000),
    (128, 256, 128, 58, 1000),
    (512, 1024, 512, 64, 250),
    (512, 1024, 512, 64, 1000),
)
QUICK = ((8, 64, 8, 4, 40), (32, 256, 32, 4, 40))

PLAY = """
import json, resource, sys, time
from pathlib import Path
from equipoise.load.export import export_trace
from equipoise.load.synthetic import SyntheticLoad, synthetic_trace
from equipoise.load.trace import LoadTrace
from equipoise.replay.costs import CostModel, model_of
from equipoise.replay.live import LiveSettings, replay_live
from equipoise.topology import EpTopology

path = Path(sys.argv[1])
ranks, experts, redundant, layers, steps, tokens, interval = map(int, sys.argv[2:9])
if sys.argv[9] == "make":
    load = SyntheticLoad(steps, layers, experts, tokens_per_step=tokens * ranks, top_k=8, drift_steps=400.0)
    export_trace(synthetic_trace(load), path)
    sys.exit()
trace = LoadTrace.open(path)
topology = EpTopology.for_experts(experts, redundant, ranks, max(1, ranks // 8))
settings = LiveSettings("equipoise", interval=interval, dispatch=sys.argv[9])
began, cpu = time.perf_counter(), time.process_time()
result = replay_live(trace, topology, settings, CostModel.named("h100", model_of(experts)))
print(json.dumps({
    "seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu,
    "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10, "trace_bytes": path.stat().st_size,
    "balancedness": result.mean_balancedness, "migrations": result.num_migrations,
    "planning_seconds": sum(plan.planning_seconds for plan in result.plans),
}))
"""


def run(path: Path, *arguments: object) -> str:
    """Runs :data:`PLAY` in a process of its own."""
    command = [sys.executable, "-c", PLAY, str(path), *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--tokens", type=int, default=256, help="tokens a rank and step")
    parser.add_argument("--dispatch", choices=("even", "weights", "static", "batch"), default="weights")
    parser.add_argument("--only", type=int, help="the size of this row alone, from 0")
    parser.add_argument("--quick", action="store_true", help="two small sizes")
    arguments = parser.parse_args()
    console, rows = Console(width=120), []
    title = f"replay of the live loop, dispatch {arguments.dispatch}, on {cpu_name()}"
    columns = "ranks", "experts", "layers", "steps", "trace", "seconds", "of CPU", "planning", "peak memory", "plans"
    table = Table(*columns, title=title)
    sizes = QUICK if arguments.quick else SIZES
    for size in sizes if arguments.only is None else sizes[arguments.only : arguments.only + 1]:
        ranks, experts, _, layers, steps = size
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.safetensors"
            common = (*size, arguments.tokens, max(10, steps // 8))
            run(path, *common, "make")
            found = json.loads(run(path, *common, arguments.dispatch))
        rows.append({"ranks": ranks, "experts": experts, "layers": layers, "steps": steps, **found})
        table.add_row(
            *map(str, (ranks, experts, layers, steps)), f"{found['trace_bytes'] / 2**20:.0f} MiB",
            f"{found['seconds']:.1f}", f"{found['cpu_seconds']:.1f}", f"{found['planning_seconds']:.1f}",
            f"{found['peak_bytes'] / 2**30:.2f} GiB", str(found["migrations"]),
        )  # fmt: skip
    console.print(table)
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = {"cpu": cpu_name(), "dispatch": arguments.dispatch, "tokens_per_rank": arguments.tokens, "rows": rows}
    (arguments.out / "replay_scale.json").write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
