"""What would serve the model, from the flags of a command."""

from __future__ import annotations

from rich.console import Console

from equipoise.cli.offline.options import Cluster
from equipoise.errors import ConfigError
from equipoise.replay.costs import CostModel, model_of

_GPUS_PER_NODE = 8
_FIGURES = ("hidden_size", "intermediate_size", "bytes_per_weight", "memory_bandwidth", "flops", "network_bandwidth")


def num_ranks_of(cluster: Cluster) -> int:
    """Ranks as given, else eight a node."""
    return cluster.num_ranks if cluster.num_ranks is not None else _GPUS_PER_NODE * cluster.num_nodes


def costs_of(cluster: Cluster, num_logical_experts: int, console: Console) -> CostModel:
    """The cost model; says so where the model's shape is a guess.

    Raises:
        ConfigError: an unknown preset, or a figure that is not above 0.
    """
    model = cluster.model
    if model is None:
        model = model_of(num_logical_experts)
        console.print(
            f"  note: expert shapes are taken for those of {model}, by the number of experts (--model sets it)",
            highlight=False,
            style="yellow",
        )
    figures = {name: getattr(cluster, name) for name in _FIGURES if getattr(cluster, name) is not None}
    for name, value in figures.items():
        if not value > 0:
            raise ConfigError(f"{name} must be above 0, got {value}", field=name)
    return CostModel.named(
        cluster.gpu, model, efficiency=cluster.efficiency, balanced_share=cluster.balanced_share, **figures
    )
