"""The flags of a launch that matter to balancing, from SGLang's command line or from its resolved arguments."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from equipoise.errors import ConfigError

_ALIASES = {
    "model_path": ("--model",),
    "tp_size": ("--tensor-parallel-size", "--tp"),
    "pp_size": ("--pipeline-parallel-size", "--pp"),
    "dp_size": ("--data-parallel-size", "--dp"),
    "attn_dp_size": ("--attention-data-parallel-size",),
    "ep_size": ("--expert-parallel-size", "--ep"),
    "moe_dp_size": ("--moe-data-parallel-size",),
}


@dataclass(frozen=True)
class LaunchFlags:
    """Named, and with the defaults, as in SGLang 0.5.23's ``ServerArgs``."""

    model_path: str | None = None
    tp_size: int = 1
    pp_size: int = 1
    dp_size: int = 1
    attn_dp_size: int = 1
    ep_size: int = 1
    moe_dp_size: int = 1
    nnodes: int = 1
    quantization: str | None = None
    tokenizer_worker_num: int = 1
    enable_dp_attention: bool = False
    enable_dp_attention_local_control_broadcast: bool = False
    moe_a2a_backend: str = "none"
    elastic_ep_backend: str | None = None
    enable_eplb: bool = False
    eplb_algorithm: str = "auto"
    eplb_rebalance_num_iterations: int = 1000
    eplb_rebalance_layers_per_chunk: int | None = None
    eplb_min_rebalancing_utilization_threshold: float = 1.0
    ep_num_redundant_experts: int = 0
    ep_dispatch_algorithm: str | None = None
    init_expert_location: str = "trivial"
    expert_distribution_recorder_mode: str | None = None
    expert_distribution_recorder_buffer_size: int | None = None
    expert_balancedness_report_mode: str = "off"

    @classmethod
    def from_server_args(cls, view: Any) -> LaunchFlags:
        """From SGLang's arguments as it has resolved them; a flag that an older version lacks keeps its default."""
        found = {name: getattr(view, name) for name in cls.names() if hasattr(view, name)}
        return cls(**found)

    @classmethod
    def from_command_line(cls, arguments: Sequence[str]) -> tuple[LaunchFlags, list[str]]:
        """From what would follow ``sglang serve``; and those arguments that balancing does not look at.

        Raises:
            ConfigError: a value that cannot be read.
        """
        found, ignored = _parser().parse_known_args(list(arguments))
        flags = cls(**vars(found))
        if flags.enable_dp_attention:  # the deprecated spelling: attention data parallelism, not replicas
            flags = cls(**{**vars(flags), "attn_dp_size": max(flags.dp_size, flags.attn_dp_size), "dp_size": 1})
        return flags, ignored

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    for field in fields(LaunchFlags):
        assert field.default is not MISSING
        spellings = ("--" + field.name.replace("_", "-"), *_ALIASES.get(field.name, ()))
        if isinstance(field.default, bool):
            parser.add_argument(*spellings, dest=field.name, action="store_true")
        else:
            kind = next((kind for kind in (int, float) if kind.__name__ in str(field.type)), str)
            parser.add_argument(*spellings, dest=field.name, type=kind, default=field.default)
    return parser
