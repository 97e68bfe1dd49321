"""Arguments of the commands that answer from a recording: one frozen dataclass each, with ``run() -> int``.

What a command needs is imported in ``run``, so that ``--help`` does not wait for torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from equipoise.cli.offline.options import Cluster, Reading, Traces, require_some


@dataclass(frozen=True)
class Plan:
    """Plan a placement from recorded load, for an engine to start with."""

    traces: Traces
    """Recorded load of any kind `equipoise inspect` knows; `-` reads from the standard input."""

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """File to write."""

    reading: Reading

    cluster: Cluster

    format: Literal["equipoise", "sglang", "vllm-ascend", "trtllm"] = "equipoise"
    """Who is to read it: --init-expert-location of equipoise or sglang, expert_map_path of vllm-ascend,
    moe_load_balancer of trtllm."""

    num_redundant_experts: int = 0
    """Slots per layer beyond one for each logical expert."""

    algorithm: str = "auto"
    """Placement algorithm; `auto` lets the load and the topology choose."""

    dispatch: Literal["even", "weights", "batch"] = "weights"
    """How the engine will split tokens over replicas: alike, by the plan's weights, or solved on each batch (the latter
    two with Equipoise only)."""

    def run(self) -> int:
        from rich.console import Console

        from equipoise.cli.offline.plan import run_plan

        require_some(self.traces, "plan")
        return run_plan(self, Console())


@dataclass(frozen=True)
class Compare:
    """Play a recording through the live loop for every combination of options, and rank them by tokens a second."""

    traces: Traces
    """Recorded load of any kind `equipoise inspect` knows; `-` reads from the standard input."""

    reading: Reading

    cluster: Cluster

    algorithm: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Algorithm to play, may be given several times; if never, every one that can plan here, but on one node none
    that plans by nodes."""

    num_redundant_experts: tyro.conf.UseAppendAction[tuple[int, ...]] = ()
    """Redundant slots per layer, may be given several times; three that fit the ranks if never."""

    interval: tyro.conf.UseAppendAction[tuple[int, ...]] = ()
    """Steps between two rebalances and in the window of each, may be given several times; by the trace's length if
    never."""

    dispatch: tyro.conf.UseAppendAction[tuple[Literal["even", "static", "weights", "batch"], ...]] = ()
    """How tokens are split over replicas, may be given several times; if never, even and weights, and batch
    for Equipoise's own algorithm."""

    dispatch_scope: Literal["rank", "node", "all"] = "rank"
    """Whose tokens dispatch `batch` evens out together: each rank its own, those of a node, or all."""

    planning_delay: int = 2
    """Steps that pass before a plan is there."""

    layers_per_chunk: int = 1
    """Commits between two steps while experts move."""

    jobs: int | None = None
    """Replays side by side; one a processor if not given."""

    resume: Path | None = None
    """File that keeps what has been played: an interrupted comparison goes on from it."""

    html: Path | None = None
    """File for a report: one page that needs nothing else."""

    png: Path | None = None
    """File for a picture, for slides."""

    json: Path | None = None
    """File for everything as JSON; `-` prints it in place of the table."""

    def run(self) -> int:
        from rich.console import Console

        from equipoise.cli.offline.compare import run_compare

        require_some(self.traces, "compare")
        return run_compare(self, Console(stderr=str(self.json) == "-"))


@dataclass(frozen=True)
class Advise:
    """Recommend redundancy, interval and dispatch for a recording, with the launch flags and what it is worth."""

    traces: Traces
    """Recorded load of any kind `equipoise inspect` knows; `-` reads from the standard input."""

    reading: Reading

    cluster: Cluster

    max_redundant_experts: int | None = None
    """Most redundant slots per layer that the memory has room for; two a rank if not given."""

    engine: Literal["equipoise", "sglang", "vllm"] | None = None
    """Print the launch flags of this engine only."""

    jobs: int | None = None
    """Replays side by side; one a processor if not given."""

    resume: Path | None = None
    """File that keeps what has been played: an interrupted run goes on from it."""

    html: Path | None = None
    """File for a report: one page that needs nothing else."""

    png: Path | None = None
    """File for a picture, for slides."""

    json: Path | None = None
    """File for everything as JSON; `-` prints it in place of the text."""

    def run(self) -> int:
        from rich.console import Console

        from equipoise.cli.offline.advise import run_advise

        require_some(self.traces, "advise")
        return run_advise(self, Console(stderr=str(self.json) == "-"))
