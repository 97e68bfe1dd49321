"""Arguments of the commands that read and write recordings: one frozen dataclass each, with ``run() -> int``.

What a command needs is imported in ``run``, so that ``--help`` does not wait for torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from equipoise.cli.offline.options import Reading, require_some


@dataclass(frozen=True)
class Inspect:
    """Say what a recording or a placement is: shapes, skew, hottest experts, worst layers, drift, phases."""

    files: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="FILE [FILE ...]", help_behavior_hint="(at least one)"),
    ]
    """Recordings, per-rank files of one recording, or a placement; `-` reads from the standard input."""

    reading: Reading

    def run(self) -> int:
        from rich.console import Console

        from equipoise.cli.offline.inspect import run_inspect

        return run_inspect(require_some(self.files, "inspect"), self.reading, Console())


@dataclass(frozen=True)
class Convert:
    """Turn any recording into Equipoise's trace, or .npz, CSV, JSON, or SGLang's stat dump."""

    input: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="IN")]
    """The recording; a folder stands for the files of all ranks, `-` for the standard input."""

    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Its suffix says the format: .safetensors (Equipoise's trace), .npz, .csv, .json, .pt (SGLang stat)."""

    reading: Reading

    def run(self) -> int:
        from rich.console import Console

        from equipoise.cli.offline.convert import run_convert

        return run_convert([self.input], self.output, self.reading, Console())


@dataclass(frozen=True)
class Merge:
    """Put recordings together to one trace: ranks of one recording are summed, recordings follow each other."""

    files: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="IN [IN ...]", help_behavior_hint="(at least one)"),
    ]
    """The recordings, in the order in which they were made."""

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """File to write; its suffix says the format, as for convert."""

    reading: Reading

    def run(self) -> int:
        from rich.console import Console

        from equipoise.cli.offline.convert import run_convert

        return run_convert(require_some(self.files, "merge"), self.out, self.reading, Console())


@dataclass(frozen=True)
class Thin:
    """Make a long trace small: sum steps, or keep a stretch of them."""

    input: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="IN")]
    """The recording."""

    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """File to write; its suffix says the format, as for convert."""

    reading: Reading

    sum: int = 1
    """Consecutive steps that become one."""

    first: int = 0
    """First step to keep."""

    last: int | None = None
    """Step behind the last one to keep; the end if not given."""

    def run(self) -> int:
        from rich.console import Console

        from equipoise.cli.offline.convert import run_thin

        return run_thin(self.input, self.output, self.reading, self.sum, slice(self.first, self.last), Console())


@dataclass(frozen=True)
class Synth:
    """Make a trace with a known skew, drift, bursts, shifts or alternation, from a seed."""

    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """File to write; its suffix says the format, as for convert."""

    num_steps: int = 256
    """Steps."""

    num_layers: int = 58
    """MoE layers."""

    num_logical_experts: int = 256
    """Experts of a layer."""

    tokens_per_step: int = 4096
    """Tokens of a step, all ranks together."""

    top_k: int = 8
    """Experts that a token chooses."""

    popularity: Literal["zipf", "dirichlet"] = "zipf"
    """Shape of the skew."""

    skew: float = 0.6
    """How uneven: the exponent of zipf, the inverse concentration of dirichlet."""

    drift_steps: float | None = None
    """Steps after which popularity has forgotten 63% of what it was; never if not given."""

    shift_every: int | None = None
    """Steps between two sudden shifts to another popularity; none if not given."""

    alternate_every: int | None = None
    """Steps between two workloads that take turns; one workload if not given."""

    burst_every: int | None = None
    """Steps between two bursts, in which a few experts take a third of all tokens; none if not given."""

    seed: int = 0
    """Of the random numbers."""

    def run(self) -> int:
        from rich.console import Console

        from equipoise.cli.offline.synth import run_synth

        return run_synth(self, Console())
