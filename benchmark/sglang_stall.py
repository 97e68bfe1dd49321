"""What a rebalance costs the answers of a real SGLang server: its own balancer against the plugin at level `full`.

    make bench-sglang ARGS='--json out/sglang_stall.json'

One model with random weights and experts of about 1 MiB, the same clients, the same number of passes between two
rebalances; the text changes its topic after each, so that there is something to move. Two CPU ranks. Measured at the
clients: the longest gap between two tokens of a stream while a rebalance is under way, and in as much time before it,
which shows what the machine does by itself. From the servers: experts and bytes that crossed between ranks, growth of
the schedulers' peak resident memory over what they held before the first rebalance, balancedness of the passes before
and after, on one topic, time from the beginning of the rebalance to its last commit. Medians over the rebalances.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from cpu import cpu_name
from helpers.sglang_server import SglangServer, scheduler_pids
from sglang_model import make_topical_model, topical_prompt

SYSTEMS = ("stock", "full")
NUM_RANKS, NUM_EXPERTS, NUM_REDUNDANT = 2, 16, 4
_BALANCEDNESS = re.compile(r"forward_pass_id=(\d+) current_pass_balancedness=([\d.]+)")
_SLACK = 0.3  # seconds until the first token after a rebalance has reached the client
_PASSES_SEEN = 20  # before and after a rebalance: a pass of a few tokens says little by itself


@dataclass(frozen=True)
class Load:
    """Model and traffic."""

    layers: int = 16
    hidden: int = 256
    intermediate: int = 384  # 3 * 256 * 384 float32: 1.125 MiB an expert, not padded by SGLang
    streams: int = 16
    passes: int = 120  # between two rebalances
    rebalances: int = 6

    @property
    def expert_bytes(self) -> int:
        return 3 * self.hidden * self.intermediate * 4


@dataclass
class Measured:
    """One system; a value for each rebalance."""

    gap: list[float] = field(default_factory=list)  # seconds, longest while the rebalance was under way
    gap_before: list[float] = field(default_factory=list)  # seconds, longest in as much time just before it
    quiet_gap: list[float] = field(default_factory=list)  # seconds, median of the period
    moves: list[int] = field(default_factory=list)
    moved_bytes: list[int] = field(default_factory=list)
    duration: list[float] = field(default_factory=list)  # seconds, from its beginning to the last commit
    balancedness_before: list[float] = field(default_factory=list)  # of the last passes before it
    balancedness: list[float] = field(default_factory=list)  # of the passes after it, from the next but one on
    memory: int = 0  # bytes, peak of all schedulers over what they held before the first rebalance


class Streams:
    """So many requests at any time, streamed; notes when each token came."""

    def __init__(self, server: SglangServer, count: int) -> None:
        self._server, self._stopped = server, False
        self.topic = 0
        self.gaps: list[tuple[float, float]] = []  # (when, seconds since the stream's last token)
        self._threads = [threading.Thread(target=self._client, args=(number,)) for number in range(count)]
        for thread in self._threads:
            thread.start()

    def _client(self, number: int) -> None:
        turn = 0
        with httpx.Client(base_url=self._server.client.base_url, timeout=300) as client:
            while not self._stopped:
                turn += 1
                self._stream(client, topical_prompt(self.topic, number * 7 + turn * 3))

    def _stream(self, client: httpx.Client, prompt: list[int]) -> None:
        body = {
            "input_ids": prompt,
            "stream": True,
            "sampling_params": {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True},
        }
        last: float | None = None
        with client.stream("POST", "/generate", json=body) as reply:
            for line in reply.iter_lines():
                if not line.startswith("data: {"):
                    continue
                now = time.monotonic()
                if last is not None:
                    self.gaps.append((now, now - last))
                last = now
                if self._stopped:
                    return

    def stop(self) -> None:
        self._stopped = True
        for thread in self._threads:
            thread.join()


class LogWatch:
    """Notes when each line of the server's log appears."""

    def __init__(self, log: Path) -> None:
        self.lines: list[tuple[float, str]] = []
        self._log, self._stopped = log, False
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()

    def _follow(self) -> None:
        with self._log.open(errors="replace") as stream:
            while not self._stopped:
                if line := stream.readline():
                    self.lines.append((time.monotonic(), line))
                else:
                    time.sleep(0.002)

    def stop(self) -> None:
        self._stopped = True
        self._thread.join()

    def passes(self) -> list[tuple[float, int, float]]:
        """(when, forward pass, balancedness) of every pass that was logged."""
        found = [(when, _BALANCEDNESS.search(line)) for when, line in self.lines]
        return [(when, int(match[1]), float(match[2])) for when, match in found if match]

    def after(self, text: str, when: float) -> float | None:
        """When rank 0 first wrote a line with ``text`` after ``when``."""
        return next((seen for seen, line in self.lines if seen > when and " TP0 " in line and text in line), None)


@contextmanager
def serving(system: str, model: Path, load: Load, log: Path) -> Iterator[SglangServer]:
    flags = (
        f"--tp={NUM_RANKS}",
        f"--ep={NUM_RANKS}",
        "--enable-eplb",
        f"--ep-num-redundant-experts={NUM_REDUNDANT}",
        f"--eplb-rebalance-num-iterations={load.passes}",
        f"--eplb-algorithm={'deepseek' if system == 'stock' else 'equipoise'}",
        "--expert-balancedness-report-mode=server_log",
        f"--max-running-requests={load.streams}",
    )
    plugins = () if system == "stock" else ("equipoise",)
    environment = {"EQUIPOISE_SGLANG": "full", "SGLANG_LOG_EXPERT_LOCATION_METADATA": "1"}
    with SglangServer(model, flags, log=log, plugins=plugins, environment=environment) as server:
        yield server


def measure(system: str, model: Path, load: Load, log: Path) -> Measured:
    """Periods of ``load.passes`` passes with one rebalance each; the first is for warming up."""
    with serving(system, model, load, log) as server:
        if system == "full":
            server.post("/eplb/rebalance", dry_run=True).raise_for_status()  # waits for the compiler
        watch, streams = LogWatch(log), Streams(server, load.streams)
        found = Measured()
        try:
            _wait_for_passes(watch, time.monotonic(), load.passes // 2)
            pids = scheduler_pids(server)
            resident = sum(_reset_peak(pid) for pid in pids)
            ends = [_wait_for_rebalance(system, server, watch, time.monotonic(), None)]
            for topic in range(1, load.rebalances + 1):
                _wait_for_passes(watch, ends[-1], _PASSES_SEEN + 1)
                streams.topic = topic
                ends.append(_wait_for_rebalance(system, server, watch, ends[-1], found))
            _wait_for_passes(watch, ends[-1], _PASSES_SEEN + 1)
            found.memory = sum(_peak(pid) for pid in pids) - resident
        finally:
            streams.stop()
            watch.stop()
    _add_client_figures(found, ends, streams, watch)
    return found


def _wait_for_rebalance(
    system: str, server: SglangServer, watch: LogWatch, since: float, found: Measured | None
) -> float:
    """Until the next rebalance has ended; when that was. Adds what the server knows of it."""
    text = "rebalance end" if system == "stock" else "rebalance after step"
    while (end := watch.after(text, since)) is None:
        assert server.process.poll() is None, "the server has ended"
        time.sleep(0.05)
    time.sleep(0.2)  # the rest of what it logs
    if found is None:
        return end
    if system == "stock":
        begin = max(when for when, line in watch.lines if when <= end and " TP0 " in line and "rebalance start" in line)
        moves = _stock_moves([line for when, line in watch.lines if since < when <= end])
        found.moves.append(moves)
        found.duration.append(end - begin)
    else:
        report = server.get("/eplb/status").json()["last_report"]
        found.moves.append(sum(report["moves"]))
        found.moved_bytes.append(report["bytes_moved"])
        found.duration.append(report["profile"]["wait_seconds"] + report["profile"]["migrate_seconds"])
    return end


def _stock_moves(lines: list[str]) -> int:
    """Slots that received an expert which their rank did not hold, from the two layouts that SGLang logs."""
    rows = [[json.loads(row) for row in re.findall(r"ep\d+=(\[[\d,]*\])", line)] for line in lines if "layer=" in line]
    rows = [row for row in rows if row]
    layers = len(rows) // 3  # before, target, after
    pairs = zip(rows[:layers], rows[layers : 2 * layers], strict=True)
    return sum(
        len([e for e in new if e not in old])
        for before, target in pairs
        for old, new in zip(before, target, strict=True)
    )


def _wait_for_passes(watch: LogWatch, since: float, count: int) -> None:
    while sum(when > since for when, _, _ in watch.passes()) < count:
        time.sleep(0.1)


def _add_client_figures(found: Measured, ends: list[float], streams: Streams, watch: LogWatch) -> None:
    passes = watch.passes()
    for (before, end), duration in zip(pairwise(ends), found.duration, strict=True):
        begin = end - duration
        took = end + _SLACK - begin
        gaps = [(when, gap) for when, gap in streams.gaps if before + _SLACK < when <= end + _SLACK]
        found.gap.append(max(gap for when, gap in gaps if when > begin and when - gap < end))
        found.gap_before.append(max((gap for when, gap in gaps if begin - took < when <= begin), default=0.0))
        found.quiet_gap.append(median(gap for _, gap in gaps))
        earlier = [value for when, _, value in passes if when < begin][-_PASSES_SEEN:]
        following = [value for when, _, value in passes if when > end][1 : _PASSES_SEEN + 1]
        found.balancedness_before.append(sum(earlier) / len(earlier))
        found.balancedness.append(sum(following) / len(following))


def _reset_peak(pid: int) -> int:
    """Has the kernel count a process's peak memory anew; its resident bytes of now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return _status_bytes(pid, "VmRSS")


def _peak(pid: int) -> int:
    return _status_bytes(pid, "VmHWM")


def _status_bytes(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def table_of(results: dict[str, Measured], load: Load) -> Table:
    table = Table(
        title=f"{load.layers} layers of {NUM_EXPERTS} + {NUM_REDUNDANT} experts of {load.expert_bytes:,} bytes"
    )
    for name in (
        "",
        "longest gap",
        "before it",
        "usual gap",
        "experts",
        "MB moved",
        "duration",
        "memory",
        "balancedness",
        "after",
    ):
        table.add_column(name, justify="right" if name else "left")
    for system, found in results.items():
        moved = found.moved_bytes or [moves * load.expert_bytes for moves in found.moves]
        table.add_row(
            system,
            f"{1e3 * median(found.gap):.0f} ms",
            f"{1e3 * median(found.gap_before):.0f} ms",
            f"{1e3 * median(found.quiet_gap):.0f} ms",
            f"{median(found.moves):.0f}",
            f"{median(moved) / 1e6:.1f}",
            f"{median(found.duration):.2f} s",
            f"+{found.memory / 2**20:.1f} MiB",
            f"{median(found.balancedness_before):.3f}",
            f"{median(found.balancedness):.3f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--quick", action="store_true", help="a small model, one rebalance each: shows that it runs")
    arguments = parser.parse_args()
    load = Load(layers=3, hidden=64, intermediate=64, passes=300, rebalances=1) if arguments.quick else Load()
    console = Console(width=120)
    results: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        model = make_topical_model(
            folder / "model",
            layers=load.layers,
            hidden=load.hidden,
            intermediate=load.intermediate,
            num_experts=NUM_EXPERTS,
        )
        for system in SYSTEMS:
            console.print(f"{system} ...")
            results[system] = measure(system, model, load, folder / f"{system}.log")
    console.print(table_of(results, load))
    if arguments.json is not None:
        content: dict[str, Any] = {"cpu": cpu_name(), "load": asdict(load)}
        content |= {system: asdict(found) for system, found in results.items()}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
