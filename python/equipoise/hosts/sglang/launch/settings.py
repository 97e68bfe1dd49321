"""What an operator sets for the plugin: its level, and the options that SGLang has no flag for."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args

from equipoise.config import EplbConfig
from equipoise.errors import ConfigError

Level = Literal["off", "algorithm", "manager", "full"]

LEVEL_VARIABLE = "EQUIPOISE_SGLANG"
FILE_VARIABLE = "EQUIPOISE_CONFIG"

_FROM_SGLANGS_FLAGS = (
    "enable_eplb",
    "eplb_algorithm",
    "eplb_rebalance_num_iterations",
    "eplb_rebalance_layers_per_chunk",
    "eplb_min_rebalancing_utilization_threshold",
    "ep_num_redundant_experts",
    "ep_dispatch_scope",
    "init_expert_location",
    "expert_distribution_recorder_mode",
    "expert_distribution_recorder_buffer_size",
)
_NOT_HERE = (
    "eplb_load_phase",  # ranks may run passes of different phases at once, and load windows must agree
    "expert_distribution_stream_buffer_size",  # recordings are SGLang's own
    "expert_distribution_stream_buffer_tokens",
    "expert_distribution_stream_max_bytes",
)
OWN_OPTIONS = tuple(
    option.name for option in fields(EplbConfig) if option.name not in (*_FROM_SGLANGS_FLAGS, *_NOT_HERE)
)
"""Fields of :class:`EplbConfig` that the file may set; the others come from SGLang's own flags.

``ep_dispatch_algorithm`` may be ``batch``, which SGLang has no name for.
"""


@dataclass(frozen=True)
class PluginSettings:
    """
    Attributes:
        level: ``full``: our manager, planner and updater; ``manager``: our manager and planner, SGLang's mover;
            ``algorithm``: our planner alone, under ``--eplb-algorithm equipoise``; ``off``: nothing.
        given: whether the operator chose the level, or it is the default.
        options: of :class:`EplbConfig`, by field name, from the file.
    """

    level: Level = "full"
    given: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dispatches_by_batch(self) -> bool:
        """Our dispatch ``batch`` takes the place of SGLang's ``dynamic``."""
        return self.options.get("ep_dispatch_algorithm") == "batch"


def read_settings(environment: Mapping[str, str]) -> PluginSettings:
    """Reads ``EQUIPOISE_SGLANG`` and the TOML file that ``EQUIPOISE_CONFIG`` names; the variable wins over the file.

    The file may hold ``level = "..."`` and a table ``[eplb]`` with :data:`OWN_OPTIONS`.

    Raises:
        ConfigError: a file that cannot be read, an unknown level, table or option.
    """
    level: str | None = None
    options: dict[str, Any] = {}
    if path := environment.get(FILE_VARIABLE):
        content = _read_toml(Path(path))
        level, options = content.pop("level", None), content.pop("eplb", {})
        _refuse_unknown(content, ("level", "eplb"), path)
        if not isinstance(options, dict):
            raise ConfigError(f"{path}: eplb must be a table, got {options!r}", field="eplb")
        _refuse_unknown(options, OWN_OPTIONS, f"{path} [eplb]")
        _check_values(options, path)
    level = environment.get(LEVEL_VARIABLE) or level
    if level is not None and level not in get_args(Level):
        known = ", ".join(get_args(Level))
        raise ConfigError(f"{LEVEL_VARIABLE} must be one of {known}, got {level!r}", field=LEVEL_VARIABLE)
    settings = PluginSettings(cast(Level, level or "full"), level is not None, options)
    if settings.level == "algorithm" and settings.dispatches_by_batch:
        raise ConfigError("ep_dispatch_algorithm 'batch' needs level manager or full", field="ep_dispatch_algorithm")
    return settings


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{FILE_VARIABLE}={path} cannot be read: {error}", field=FILE_VARIABLE) from error


def _check_values(options: dict[str, Any], path: str) -> None:
    try:
        EplbConfig(**options)
    except ConfigError as error:
        raise ConfigError(f"{path} [eplb]: {error}", field=error.field) from error
    except TypeError as error:  # compared with a number
        raise ConfigError(f"{path} [eplb]: a value of the wrong type: {error}", field="eplb") from error
    if (dispatch := options.get("ep_dispatch_algorithm", "batch")) != "batch":
        raise ConfigError(
            f"{path} [eplb]: ep_dispatch_algorithm may be 'batch' here, got {dispatch!r}; "
            "give SGLang's own by --ep-dispatch-algorithm",
            field="ep_dispatch_algorithm",
        )


def _refuse_unknown(given: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for name in given:
        if name not in known:
            raise ConfigError(f"{where}: unknown key {name!r}; known are {', '.join(known)}", field=name)
