"""Records the sample trace that comes with Equipoise: the demo model under a workload that shifts topic every so often.

    python scripts/record_sample_trace.py

A real server, real clients, and its own dump: prose, code, data, German, and prose again.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import Progress

import equipoise.engine.demo_model
from demo_server import Server, Traffic
from equipoise.load.trace import LoadTrace

TOPICS = ["prose", "code", "data", "german", "prose"]
LARGEST_BYTES = 2 << 20


async def record(url: str, steps_per_topic: int, console: Console) -> Path:
    """Sends each topic for so many steps; returns the path of the dump."""
    traffic = Traffic(url, equipoise.engine.demo_model.prompts(), clients=12, max_new_tokens=48)
    async with httpx.AsyncClient(base_url=url, timeout=120.0) as http:

        async def step_number() -> int:
            return int((await http.get("/eplb/status")).raise_for_status().json()["forward_pass_id"])

        (await http.post("/start_expert_distribution_record")).raise_for_status()
        with Progress(console=console) as bar:
            for topic in TOPICS:
                task, begin, done = bar.add_task(topic, total=steps_per_topic), await step_number(), 0
                traffic.start(topic)
                while done < steps_per_topic:
                    await asyncio.sleep(0.2)
                    done = await step_number() - begin
                    bar.update(task, completed=done)
        (await http.post("/stop_expert_distribution_record")).raise_for_status()
        await traffic.stop()
        return Path((await http.post("/dump_expert_distribution_record")).raise_for_status().json()["path"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps-per-topic", type=int, default=256, help="forward passes of each topic (default: 256)")
    output = equipoise.engine.demo_model.path() / "sample_trace.npz"
    parser.add_argument("--output", type=Path, default=output, help=f"file to write (default: {output})")
    arguments = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        options = ["--model-path", "demo", "--dump-dir", folder, "--expert-distribution-recorder-buffer-size", "8192"]
        with Server(options, on_line=lambda line: console.print(line, style="dim", markup=False)) as server:
            dump = asyncio.run(record(server.url, arguments.steps_per_topic, console))
        size = dump.stat().st_size
        if size > LARGEST_BYTES:
            print(f"record_sample_trace: the trace has {size} bytes, more than {LARGEST_BYTES}", file=sys.stderr)
            return 2
        shutil.copyfile(dump, arguments.output)
    trace = LoadTrace.open(arguments.output)
    shape = f"{trace.num_steps} steps of {trace.num_layers} layers with {trace.num_logical_experts} experts"
    console.print(f"wrote {arguments.output}: {shape}, {size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
