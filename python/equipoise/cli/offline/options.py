"""Groups of flags that the offline commands share, and what they all check."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from equipoise.errors import ConfigError

Traces = Annotated[
    tyro.conf.Positional[tuple[Path, ...]],
    tyro.conf.arg(metavar="TRACE [TRACE ...]", help_behavior_hint="(at least one)"),
]


@dataclass(frozen=True)
class Reading:
    """How a recording is read, where it does not say so itself."""

    tokens_per_step: int = 128
    """For traces of single tokens: consecutive tokens that make one step."""

    num_logical_experts: int | None = None
    """Experts of a layer, where a file names only those that were chosen; guessed from the highest if not given."""

    read_as: Literal["auto", "counts", "tokens"] = "auto"
    """For an array without a name: counts of experts, or expert ids of tokens."""

    def __post_init__(self) -> None:
        for name in ("tokens_per_step", "num_logical_experts"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}", field=name)


@dataclass(frozen=True)
class Cluster:
    """What would serve the model."""

    gpu: str = "h100"
    """Kind of GPU, for times: a100, h20, h100, h200, b200, mi300x."""

    num_nodes: int = 1
    """Nodes the ranks form."""

    num_ranks: int | None = None
    """Ranks of expert parallelism, one a GPU; 8 a node if not given."""

    model: str | None = None
    """Shape of the experts, for times: deepseek-v3, deepseek-v2-lite, qwen3-235b, qwen3-30b, gpt-oss-120b, gpt-oss-20b;
    by the number of experts if not given."""

    hidden_size: int | None = None
    """Of the model, in place of the preset's."""

    intermediate_size: int | None = None
    """Of one expert, in place of the preset's."""

    bytes_per_weight: float | None = None
    """Of an expert's weights, in place of the preset's: 2 for bf16, 1 for fp8, 0.5 for 4 bits."""

    memory_bandwidth: float | None = None
    """Of a GPU, bytes a second, in place of the preset's."""

    flops: float | None = None
    """Dense bf16 of a GPU, a second, in place of the preset's."""

    network_bandwidth: float | None = None
    """Of a GPU to other nodes, bytes a second in one direction, in place of the preset's."""

    efficiency: float = 0.6
    """Part of the GPU's figures that kernels reach."""

    balanced_share: float = 0.5
    """Part of a perfectly balanced step that is spent in experts; the rest is the same however experts lie."""

    num_groups: int | None = None
    """Expert groups of group-limited routing, for the algorithms that honour them."""

    def __post_init__(self) -> None:
        for name in ("num_nodes", "num_ranks", "num_groups"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}", field=name)


def require_some(files: tuple[Path, ...], command: str) -> tuple[Path, ...]:
    if not files:
        word = "FILE" if command in ("inspect", "merge") else "TRACE"
        raise ConfigError(
            f"{command} needs at least one {word}, got none; see equipoise {command} --help", field="traces"
        )
    return files
