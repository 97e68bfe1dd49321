"""Arguments of the commands that serve and look at placements: one frozen dataclass each, with ``run() -> int``.

What a command needs is imported in ``run``, so that ``--help`` does not wait for torch.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from equipoise.config import EngineConfig, EplbConfig, HttpConfig, ServeConfig
from equipoise.errors import ConfigError
from equipoise.replay.config import ReplayConfig


@dataclass(frozen=True)
class Serve:
    """Serve a model over HTTP; experts are recorded, rebalanced and moved while it answers."""

    engine: EngineConfig
    eplb: EplbConfig
    http: HttpConfig

    def run(self) -> int:
        from equipoise.server.launch import serve

        code = serve(ServeConfig(self.engine, self.eplb, self.http))
        # The engine is closed and nothing is left to do. Taking torch down in order takes seconds, and whoever sent
        # SIGTERM waits for them.
        with contextlib.suppress(OSError):  # the reader of a pipe has left
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


@dataclass(frozen=True)
class Replay:
    """Play recorded load window by window and compare placement algorithms on it."""

    traces: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="TRACE [TRACE ...]", help_behavior_hint="(at least one)"),
    ]
    """Recorded load of any kind `equipoise inspect` knows; `-` reads from the standard input."""

    replay: ReplayConfig

    algorithm: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Algorithm to play, may be given several times; all of them if never. An unknown name lists the known ones."""

    json: Path | None = None
    """File that the results are written to as JSON, beside the table on the screen."""

    def run(self) -> int:
        if not self.traces:
            raise ConfigError("replay needs at least one TRACE, got none; see equipoise replay --help", field="traces")
        from rich.console import Console

        from equipoise.algorithms.registry import available_algorithms
        from equipoise.cli.replay import run_replay

        algorithms = list(self.algorithm) or available_algorithms()
        return run_replay(self.replay, list(self.traces), algorithms, self.json, Console())


@dataclass(frozen=True)
class ExplainTransfer:
    """Show what would move between two placements: who sends which expert to whom, in which round."""

    old: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OLD")]
    """Placement of now: JSON or .pt with `physical_to_logical_map`, as GET /eplb/expert_location answers."""

    new: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="NEW")]
    """Placement to reach."""

    num_ranks: int | None = None
    """Ranks the slots are spread over; from OLD if it says so."""

    num_nodes: int | None = None
    """Nodes the ranks form; from OLD if it says so, else 1."""

    max_staged_experts: int | None = None
    """Experts a rank may stage at once; layers that need more move in several steps."""

    layer: int | None = None
    """Show every transfer of this layer, instead of a line per layer."""

    def run(self) -> int:
        from rich.console import Console

        from equipoise.cli.explain_transfer import explain_transfer

        return explain_transfer(
            self.old,
            self.new,
            Console(),
            num_ranks=self.num_ranks,
            num_nodes=self.num_nodes,
            max_staged_experts=self.max_staged_experts,
            layer_id=self.layer,
        )


@dataclass(frozen=True)
class Doctor:
    """Check the flags of another engine's launch for what balancing would run into; exit code 1 if there is any."""

    launch: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="sglang [FLAGS ...]")]
    """The engine, then the flags as they follow `sglang serve`."""

    def run(self) -> int:
        from rich.console import Console

        from equipoise.cli.doctor import run_doctor

        return run_doctor(self.launch, os.environ, Console())


@dataclass(frozen=True)
class WarmUp:
    """Compile every kernel that planning and moving need, once after an installation; serving then starts at once."""

    def run(self) -> int:
        import subprocess
        import sys
        import time

        began = time.monotonic()
        done = subprocess.run([sys.executable, "-m", "equipoise.manager.warm_up"])
        if done.returncode == 0:
            print(f"kernels are compiled and cached ({time.monotonic() - began:.1f} s)")
        return done.returncode
