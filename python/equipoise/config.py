"""Every option once: its default, unit and validation. The command line and the docs are made from these classes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from equipoise.errors import ConfigError

DispatchAlgorithm = Literal["static", "dynamic", "batch"]
DispatchScope = Literal["rank", "node", "all"]
LoadPhase = Literal["all", "prefill", "decode"]
RecorderMode = Literal["stat", "per_pass"]
StreamMode = Literal["per_pass", "per_token"]
Verification = Literal["off", "canary", "checksum"]
TransferMode = Literal["sync", "chunked", "async"]
TransferTransport = Literal["auto", "nccl", "host"]


def require(condition: bool, name: str, value: object, must: str) -> None:
    """
    Raises:
        ConfigError: the condition does not hold; names the field ``name``, its value, and what it must be.
    """
    if not condition:
        raise ConfigError(f"{name} must be {must}, got {value!r}", field=name)


def require_at_least(least: float, config: object, names: str) -> None:
    """
    Raises:
        ConfigError: one of the fields of ``config`` that ``names`` lists is below ``least`` (and not None).
    """
    for name, value in ((name, getattr(config, name)) for name in names.split()):
        require(value is None or value >= least, name, value, f"at least {least}")


@dataclass(frozen=True)
class EplbConfig:
    """Balancing of experts over ranks."""

    enable_eplb: bool = False
    """Rebalance experts on its own every --eplb-rebalance-num-iterations steps. A rebalance over HTTP works without."""

    eplb_algorithm: str = "auto"
    """Placement algorithm; `auto` lets the load and the topology choose."""

    eplb_rebalance_num_iterations: int = 1000
    """Forward passes between two rebalances; also how many of them a plan looks back on, at most."""

    eplb_load_phase: LoadPhase = "all"
    """Tokens that plans are made from: `all`; those of `prefill`; those of `decode`, of requests that add one token to
    a forward pass. Forward passes with none of them are left out of the load window."""

    eplb_transfer_mode: TransferMode = "async"
    """`async`: experts travel in the background, a forward pass waits only for a layer's commit; `chunked`: layers are
    moved between forward passes; `sync`: everything at once, as fast as it goes, while nothing is answered."""

    eplb_rebalance_layers_per_chunk: int = 1
    """Layers committed between two forward passes while migrating (`async`, `chunked`)."""

    eplb_min_rebalancing_utilization_threshold: float = 1.0
    """Skip a periodic rebalance while mean balancedness over the window is above this, in (0, 1]."""

    eplb_max_moves_per_layer: int | None = None
    """Hard limit on the slots of a layer that may receive another expert in one rebalance."""

    eplb_move_price: float = 0.12
    """Balancedness that moving every slot of a layer within its node must gain to be worth it; a lower price moves
    more for a little more balance. With two slots a rank `equipoise` takes .6 of it, and a third with more than four
    windows."""

    eplb_verification: Verification = "canary"
    """`canary`: each expert's id travels with its weights and is checked before a layer commits; `checksum`: a 64-bit
    checksum of its content as well."""

    eplb_staging_bytes: int | None = None
    """Most bytes a rank may hold in staging while it receives, at least one expert; None: four experts of the largest
    layer. A layer of which a rank receives more moves in several steps, each committed by itself."""

    eplb_transfer_timeout: float = 60.0
    """Seconds a layer's transfer may take before it is given up and the old layer serves on."""

    eplb_transport: TransferTransport = "auto"
    """How experts travel between ranks. `nccl`: from GPU to GPU; `host`: through pinned host memory and sockets, slower
    and never in the way of a forward pass's own NCCL kernels; `auto`: `nccl` on GPUs. On CPUs it is gloo."""

    eplb_profile: bool = False
    """Log after each rebalance where its time went."""

    eplb_transfer_duty: float = 1.0
    """Share of the time that background transfers may use, in (0, 1]: less leaves more for forward passes (`async`)."""

    ep_num_redundant_experts: int = 0
    """Slots per layer beyond one for each logical expert; logical + redundant must divide evenly over the ranks."""

    ep_dispatch_algorithm: DispatchAlgorithm = "dynamic"
    """Choice among replicas. `static`: the nearest; `dynamic`: by dispatch weight; `batch`: evens out each batch."""

    ep_dispatch_scope: DispatchScope = "rank"
    """Whose tokens `batch` evens out together: each rank its own, without a message; those of a `node`; of `all`."""

    ep_dispatch_active_expert_cost: float | Literal["auto"] = 0.0
    """Tokens that an activated expert costs its rank (`batch`); `auto`: from the size of an expert and the device."""

    ep_dispatch_cross_node_cost: float = 0.0
    """What a token sent to another node costs, in parts of computing it there (`batch` in scope `rank` or `node`)."""

    init_expert_location: str = "trivial"
    """First placement: `trivial`, or a .json/.pt file with `physical_to_logical_map` or `logical_count`."""

    expert_distribution_recorder_mode: RecorderMode = "stat"
    """What a dump holds. `stat`: logical counts per step; `per_pass`: physical counts per step as well."""

    expert_distribution_recorder_buffer_size: int = 1000
    """Steps the recorder keeps; older ones are overwritten."""

    expert_distribution_stream_buffer_size: int = 64
    """Steps of a streamed recording that may wait for the disk; a step that finds no room is dropped, and counted."""

    expert_distribution_stream_buffer_tokens: int = 16384
    """The same in tokens of a rank, where each token's experts are streamed; steps of more are always dropped."""

    expert_distribution_stream_max_bytes: int = 2 << 30
    """Most bytes of a streamed recording's file, one for each rank; steps that no longer fit are dropped."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "eplb_rebalance_num_iterations eplb_rebalance_layers_per_chunk eplb_staging_bytes")
        require_at_least(1, self, "expert_distribution_recorder_buffer_size expert_distribution_stream_buffer_size")
        require_at_least(1, self, "expert_distribution_stream_max_bytes expert_distribution_stream_buffer_tokens")
        require_at_least(0, self, "ep_num_redundant_experts eplb_max_moves_per_layer")
        phases = get_args(LoadPhase)
        require(self.eplb_load_phase in phases, "eplb_load_phase", self.eplb_load_phase, f"one of {', '.join(phases)}")
        threshold = self.eplb_min_rebalancing_utilization_threshold
        require(0 < threshold <= 1, "eplb_min_rebalancing_utilization_threshold", threshold, "in (0, 1]")
        require(self.eplb_transfer_timeout > 0, "eplb_transfer_timeout", self.eplb_transfer_timeout, "above 0 seconds")
        require(0 < self.eplb_transfer_duty <= 1, "eplb_transfer_duty", self.eplb_transfer_duty, "in (0, 1]")
        price = self.eplb_move_price
        require(0 <= price < math.inf, "eplb_move_price", price, "finite and not negative")


@dataclass(frozen=True)
class EngineConfig:
    """The embedded engine: one model over --ep-size worker processes."""

    model_path: str
    """Directory of a Hugging Face MoE model, or `demo` for the small model that comes with Equipoise."""

    ep_size: int = 1
    """Ranks over which the experts are spread; one process each."""

    nnodes: int = 1
    """Nodes the ranks form. On one machine they are simulated: planning and byte counts treat them as real."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights; `auto`: the checkpoint's on a GPU, float32 on a CPU."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: one GPU per rank (NCCL) if there are enough of them, else the CPU (gloo)."""

    max_running_requests: int = 16
    """Requests decoded together; further ones wait."""

    max_model_len: int = 1024
    """Most tokens of a request, prompt and answer together."""

    chunked_prefill_size: int = 2048
    """Most prompt tokens in one forward pass."""

    random_seed: int = 0
    """Seed of sampled decoding."""

    watchdog_timeout: float = 300.0
    """Seconds without a sign of life, more than any forward pass takes, after which the engine is given up (exit 1)."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level of log lines on stderr, of the server and of all ranks."""

    def __post_init__(self) -> None:
        require_at_least(
            1, self, "ep_size nnodes max_running_requests max_model_len chunked_prefill_size watchdog_timeout"
        )
        require(self.ep_size % self.nnodes == 0, "nnodes", self.nnodes, f"a divisor of ep_size={self.ep_size}")


@dataclass(frozen=True)
class HttpConfig:
    """The HTTP server."""

    host: str = "127.0.0.1"
    """Address to listen on. The default is loopback: nobody outside this machine can reach it."""

    port: int = 30000
    """TCP port to listen on."""

    api_key: str | None = None
    """When set, requests need `Authorization: Bearer KEY`. Flags show in `ps`: give `@FILE`, or $EQUIPOISE_API_KEY."""

    admin_api_key: str | None = None
    """When set, /eplb/* and the record calls need this key instead. Also `@FILE`, or $EQUIPOISE_ADMIN_API_KEY."""

    served_model_name: str | None = None
    """Name that /v1/completions answers with; the model path if None."""

    dump_dir: str = "."
    """Directory that /dump_expert_distribution_record writes into."""

    max_queued_requests: int = 1024
    """Requests that may wait for a place among the running ones; more are refused with 429."""

    request_timeout: float | None = None
    """Seconds a request may take, waiting included, before it ends with 504."""

    health_timeout: float = 20.0
    """Seconds without a sign of life from all ranks, after which /health answers 503."""

    drain_timeout: float = 3.0
    """Seconds that running requests may go on after SIGTERM before they are ended."""

    def __post_init__(self) -> None:
        require(0 <= self.port <= 65535, "port", self.port, "in [0, 65535]; 0 picks a free one")
        for name, key in (("api_key", self.api_key), ("admin_api_key", self.admin_api_key)):
            require(key is None or bool(key.strip()), name, "", "a key that is not empty")
        require_at_least(0, self, "max_queued_requests drain_timeout")
        require_at_least(0.001, self, "request_timeout health_timeout")


@dataclass(frozen=True)
class ServeConfig:
    """`equipoise serve`."""

    engine: EngineConfig
    eplb: EplbConfig = field(default_factory=EplbConfig)
    http: HttpConfig = field(default_factory=HttpConfig)
