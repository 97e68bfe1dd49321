"""The first five minutes of Equipoise: one small MoE on four ranks, its load shifts, it is rebalanced as it answers.

Everything is real: `equipoise serve` with four worker processes, streaming HTTP clients, a rebalance over HTTP, and at
the end every greedy answer compared with the plain transformers model's.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.live import Live
from rich.progress import track

import equipoise.engine.demo_model
from demo_dispatch import dispatch_gain
from demo_server import Server, Traffic
from demo_view import command_text, last_screen, layer_table, scene, step_table
from equipoise.load.trace import LoadTrace

WINDOW_STEPS = 80  # the load window of every picture and plan: a few seconds of traffic
KEPT_STEPS = 5000  # of the recording: all acts, on any machine
NUM_CLIENTS = 8
MAX_NEW_TOKENS = 24


@dataclass(frozen=True)
class Story:
    """What the acts left behind; statuses are answers of GET /eplb/status."""

    fitted: dict[str, Any]  # after the rebalance for the first topic
    before: dict[str, Any]  # after the topic has shifted
    after: dict[str, Any]  # after the rebalance for the second topic
    location: dict[str, Any]  # the placement and its weights before that rebalance: GET /eplb/expert_location
    report: dict[str, Any]  # that rebalance's
    dump: str  # path of the recorded load
    steps: dict[str, list[float]]  # seconds, by act


class Demo:
    """The story, act by act."""

    def __init__(self, server: Server, console: Console, act_seconds: float) -> None:
        self.console = console
        prompts = equipoise.engine.demo_model.prompts()
        self.traffic = Traffic(server.url, prompts, clients=NUM_CLIENTS, max_new_tokens=MAX_NEW_TOKENS)
        self._http = httpx.AsyncClient(base_url=server.url, timeout=120.0)
        self._act_seconds = act_seconds
        self._live: Live | None = None

    async def play(self) -> Story:
        """Runs all acts."""
        with Live(console=self.console, refresh_per_second=4, transient=True) as self._live:
            await self._post("/start_expert_distribution_record")
            self.traffic.start("prose")
            await self._act(
                "1  Prose",
                "Four ranks hold the experts in plain order, and clients ask for prose. The topic's favourite experts "
                "share ranks: those ranks are hot, the others wait for them.",
            )
            await self._post("/eplb/rebalance")
            fitted = await self._act(
                "2  Rebalanced for prose",
                "POST /eplb/rebalance: hot experts got replicas, and experts that are hot together were set apart.",
            )
            self.traffic.start("code")
            before = await self._act(
                "3  The topic shifts to code",
                "Other experts are hot now, and the placement no longer fits: imbalance rises. Dispatch by the batch "
                "evens out what the replicas of this placement allow.",
            )
            location = await self._get("/eplb/expert_location")
            preview = await self._post("/eplb/rebalance", dry_run=True)
            previewed = await self._act(
                "4  Preview",
                "A dry run says what a rebalance would do, and changes nothing: balancedness "
                f"{preview['mean_balancedness_before']:.3f} -> {preview['mean_balancedness_after']:.3f} for "
                f"{sum(preview['slots_changed'])} changed slots.",
                seconds=2,
            )
            report = await self._post("/eplb/rebalance")
            after = await self._act(
                "5  Rebalanced for code, while requests stream",
                f"{sum(report['slots_changed'])} slots changed, {report['bytes_moved'] / 1e6:.2f} MB crossed a wire, "
                "no request waited or failed. The load is even again.",
            )
            await self.traffic.stop()
        await self._post("/stop_expert_distribution_record")
        dump = await self._post("/dump_expert_distribution_record")
        steps = (await self._http.get("/eplb/steps", params={"since": 0})).raise_for_status().json()
        begin, end = previewed["forward_pass_id"], report["forward_pass_id"]
        return Story(fitted, before, after, location, report, dump["path"], steps_by_act(steps, begin, end))

    async def close(self) -> None:
        await self._http.aclose()

    async def _act(self, title: str, words: str, seconds: float | None = None) -> dict[str, Any]:
        """Shows the scene until its time is up and the window holds nothing older; returns the last status."""
        assert self._live is not None
        started, first_step = time.monotonic(), None
        while True:
            status = await self._get("/eplb/status")
            first_step = status["forward_pass_id"] if first_step is None else first_step
            self._live.update(scene(title, words, status, self.traffic.last_text, len(self.traffic.answers)))
            waited = time.monotonic() - started
            fresh = status["forward_pass_id"] - first_step >= WINDOW_STEPS
            if waited >= (seconds or self._act_seconds) and (fresh or seconds is not None):
                break
            await asyncio.sleep(0.4)
        # Above the live picture, where it stays when the next act begins and when the demo has ended.
        self.console.print(scene(title, words, status, self.traffic.last_text, len(self.traffic.answers)))
        return status

    async def _get(self, path: str) -> dict[str, Any]:
        return (await self._http.get(path)).raise_for_status().json()

    async def _post(self, path: str, **body: Any) -> dict[str, Any]:
        response = await self._http.post(path, json=body or None)
        if response.is_error:
            raise SystemExit(f"{path} answered {response.status_code}: {response.text}")
        return response.json()


def steps_by_act(steps: list[dict[str, Any]], begin: int, end: int) -> dict[str, list[float]]:
    """Step times before, during and after the rebalance that was asked for at step ``begin`` and ended at ``end``."""
    acts: dict[str, list[float]] = {"before": [], "during": [], "after": []}
    for step in steps:
        number = step["forward_pass_id"]
        if number > end:
            acts["after"].append(step["seconds"])
        elif number > begin:
            acts["during"].append(step["seconds"])
        elif number > begin - 2 * WINDOW_STEPS and step["phase"] == "collecting":
            acts["before"].append(step["seconds"])
    return acts


def check_answers(answers: list[tuple[str, tuple[int, ...]]], console: Console) -> int:
    """How many answers equal the plain model's; prints those that do not."""
    from demo_reference import Reference  # brings torch and transformers, which nothing before this needs

    reference = Reference(equipoise.engine.demo_model.path())
    prompts = sorted({prompt for prompt, _ in answers})
    label = f"plain transformers answers the same {len(prompts)} prompts"
    expected = {p: reference.answer(p, MAX_NEW_TOKENS) for p in track(prompts, label, console=console)}
    wrong = [(prompt, tokens) for prompt, tokens in answers if tokens != expected[prompt]]
    for prompt, tokens in wrong[:3]:
        text = f"DIFFERS after {prompt!r}:\n  served {tokens}\n  plain  {expected[prompt]}"
        console.print(text, style="red", markup=False)
    return len(answers) - len(wrong)


def replay_dump(dump: str, json_path: Path, console: Console) -> None:
    """Plays the run's own recorded load against other algorithms."""
    command = ["equipoise", "replay", dump, "--num-ranks", "4", "--num-nodes", "2", "--num-redundant-experts", "8"]
    command += ["--window", "40", "--algorithm", "deepseek", "--algorithm", "auto", "--json", str(json_path)]
    console.print("\n[bold]What rebalancing every 40 steps would have done with this very run:[/]")
    console.print(command_text(command, console.width))
    subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--act-seconds", type=float, default=5.0, help="least time of an act (default: 5)")
    parser.add_argument("--quick", action="store_true", help="acts as short as they can be")
    parser.add_argument("--keep-running", action="store_true", help="leave the server up at the end, until Ctrl-C")
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="folder for dump and replay (default: out/demo)"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.act_seconds = 0.0
    arguments.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    console = Console()
    # On the CPU, as the reference it is compared with: on GPUs equal bits are not promised, see docs/gpu.md.
    options = ["--model-path", "demo", "--device", "cpu", "--ep-size", "4", "--nnodes", "2"]
    options += ["--ep-num-redundant-experts", "8", "--ep-dispatch-algorithm", "batch"]
    options += (
        f"--expert-distribution-recorder-mode per_pass --expert-distribution-recorder-buffer-size {KEPT_STEPS}".split()
    )
    options += f"--eplb-rebalance-num-iterations {WINDOW_STEPS} --log-level warning --dump-dir {arguments.out}".split()
    server = Server(options, on_line=lambda line: console.print(f"  {line}", style="dim", markup=False))
    console.print(command_text(server.command, console.width))
    with server:
        demo = Demo(server, console, arguments.act_seconds)

        async def play() -> dict[str, Any]:
            try:
                return await demo.play()
            finally:
                await demo.close()

        story = asyncio.run(play())
        console.print(layer_table(story.before, story.after, story.report))
        console.print(step_table(story.steps))
        num_right = check_answers(demo.traffic.answers, console)
        replay_dump(story.dump, arguments.out / "replay.json", console)
        num_answers = len(demo.traffic.answers)
        trace = LoadTrace.open(story.dump)
        gain = dispatch_gain(trace, story.before, story.after, story.location, WINDOW_STEPS)
        console.print(last_screen(story, gain, num_right, num_answers, time.monotonic() - started))
        if arguments.keep_running:
            console.print(f"The server stays up on {server.url} (try {server.url}/eplb/status); Ctrl-C ends it.")
            try:
                while True:
                    time.sleep(3600)
            except KeyboardInterrupt:
                console.print("stopped")
    return 0 if num_right == num_answers > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
