"""What a step costs in seconds: a roofline of the expert layers, rank by rank.

A rank's expert layer takes the longer of computing its tokens and reading the weights of the experts that they
activate (S. Williams et al., "Roofline", CACM 2009); tokens travel before and after it. The slowest rank of a layer
holds up all others, so a layer costs its maximum and a step the sum over layers. Decode is bound by reading: there what
counts is how many experts a rank activates, not how many tokens it has.

Figures of GPUs are the vendors' (dense bf16 without sparsity, peak memory bandwidth, NVLink or its like in one
direction, network a GPU); ``efficiency`` is the part of them that kernels reach.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from equipoise.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """What a GPU can do."""

    flops: float  # dense bf16 a second; fp8 weights double it
    memory_bandwidth: float  # bytes a second
    node_bandwidth: float  # to another GPU of the node, bytes a second in one direction
    network_bandwidth: float  # to another node, bytes a second in one direction


GPUS = MappingProxyType(
    {
        "a100": Gpu(312e12, 2.0e12, 300e9, 25e9),
        "h20": Gpu(148e12, 4.0e12, 450e9, 50e9),
        "h100": Gpu(989e12, 3.35e12, 450e9, 50e9),
        "h200": Gpu(989e12, 4.8e12, 450e9, 50e9),
        "b200": Gpu(2250e12, 8.0e12, 900e9, 50e9),
        "mi300x": Gpu(1307e12, 5.3e12, 448e9, 50e9),
    }
)


@dataclass(frozen=True)
class ModelShape:
    """The expert layers of a model."""

    hidden_size: int
    intermediate_size: int  # of one expert
    bytes_per_weight: float
    top_k: int

    @property
    def expert_bytes(self) -> int:
        """Of one expert of one layer: gate, up and down projection."""
        return int(3 * self.hidden_size * self.intermediate_size * self.bytes_per_weight)

    @property
    def expert_flops(self) -> float:
        """Of one token in one expert."""
        return 6.0 * self.hidden_size * self.intermediate_size


MODELS = MappingProxyType(
    {
        "deepseek-v3": ModelShape(7168, 2048, 1.0, 8),
        "deepseek-v2-lite": ModelShape(2048, 1408, 2.0, 6),
        "qwen3-235b": ModelShape(4096, 1536, 2.0, 8),
        "qwen3-30b": ModelShape(2048, 768, 2.0, 8),
        "gpt-oss-120b": ModelShape(2880, 2880, 0.5, 4),
        "gpt-oss-20b": ModelShape(2880, 2880, 0.5, 4),
    }
)
_BY_EXPERTS = {256: "deepseek-v3", 64: "deepseek-v2-lite", 128: "qwen3-235b", 32: "gpt-oss-20b"}


def model_of(num_logical_experts: int) -> str:
    """The model that a number of experts suggests; the nearest known one."""
    return _BY_EXPERTS[min(_BY_EXPERTS, key=lambda known: abs(known - num_logical_experts))]


@dataclass(frozen=True)
class CostModel:
    """Seconds of expert layers, transfers and commits.

    Attributes:
        efficiency: part of the GPU's figures that kernels reach.
        balanced_share: part of a perfectly balanced step that is spent in expert layers; the rest (attention, sampling)
            is the same however experts lie.
    """

    gpu: Gpu
    shape: ModelShape
    efficiency: float = 0.6
    balanced_share: float = 0.5

    def __post_init__(self) -> None:
        for name in ("efficiency", "balanced_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in (0, 1], got {getattr(self, name)}", field=name)

    @classmethod
    def named(cls, gpu: str, model: str, **more: float) -> CostModel:
        """
        Raises:
            ConfigError: no such preset; the message lists them.
        """
        for field, name, known in (("gpu", gpu, GPUS), ("model", model, MODELS)):
            if name not in known:
                raise ConfigError(f"{field} must be one of {', '.join(known)}, got {name!r}", field=field)
        figures = {key: more.pop(key) for key in list(more) if key in Gpu.__dataclass_fields__}
        sizes = {key: more.pop(key) for key in list(more) if key in ModelShape.__dataclass_fields__}
        return cls(replace(GPUS[gpu], **figures), replace(MODELS[model], **sizes), **more)  # type: ignore[arg-type]

    @property
    def active_expert_cost(self) -> float:
        """Tokens whose computing takes as long as reading the weights of one more expert."""
        gpu, shape = self.gpu, self.shape
        doubled = 2.0 if shape.bytes_per_weight <= 1 else 1.0
        return (shape.expert_bytes / gpu.memory_bandwidth) / (shape.expert_flops / (gpu.flops * doubled))

    def rank_seconds(self, tokens: np.ndarray, activated: np.ndarray, num_nodes: int, num_ranks: int) -> np.ndarray:
        """Seconds of each rank in each layer.

        Args:
            tokens: (L, G) token-expert pairs that a rank computes.
            activated: (L, G) experts whose weights it reads.
        """
        gpu, shape = self.gpu, self.shape
        doubled = 2.0 if shape.bytes_per_weight <= 1 else 1.0
        compute = tokens * (shape.expert_flops / (gpu.flops * doubled * self.efficiency))
        reading = activated * (shape.expert_bytes / (gpu.memory_bandwidth * self.efficiency))
        # A token travels to the rank and its answer back, as bf16; of those that leave a rank, a share crosses nodes.
        away = 1.0 - 1.0 / num_ranks
        crossing = 1.0 - 1.0 / num_nodes
        per_token = 2 * 2 * shape.hidden_size * (
            crossing / gpu.network_bandwidth + max(0.0, away - crossing) / gpu.node_bandwidth
        )  # fmt: skip
        return np.maximum(compute, reading) + tokens * (per_token / self.efficiency)

    def step_seconds(
        self, tokens: np.ndarray, activated: np.ndarray, num_nodes: int, num_ranks: int
    ) -> tuple[float, float]:
        """(Seconds of the expert layers of a step, of which lost to imbalance)."""
        per_rank = self.rank_seconds(tokens, activated, num_nodes, num_ranks)
        slowest = per_rank.max(-1)
        return float(slowest.sum()), float((slowest - per_rank.mean(-1)).sum())

    def transfer_seconds(self, experts_over_ranks: np.ndarray, copies: int = 0) -> float:
        """Time that a batch of transfers takes on the busiest link.

        Args:
            experts_over_ranks: (G, 4) experts that each rank sends, receives, sends to and receives from other nodes.
        """
        sent, received, crossed_out, crossed_in = experts_over_ranks.T.astype(np.float64)
        size = self.shape.expert_bytes / self.efficiency
        inside = np.maximum(sent - crossed_out, received - crossed_in).max(initial=0.0) * size / self.gpu.node_bandwidth
        across = np.maximum(crossed_out, crossed_in).max(initial=0.0) * size / self.gpu.network_bandwidth
        return max(float(inside), float(across)) + self.commit_seconds(copies)

    def commit_seconds(self, experts: int) -> float:
        """Time in which a rank puts received experts in place: each is read and written once."""
        return 2.0 * experts * self.shape.expert_bytes / (self.gpu.memory_bandwidth * self.efficiency)
