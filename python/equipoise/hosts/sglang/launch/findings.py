"""What a launch is checked with, and what such a check finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from equipoise.hosts.sglang.launch.flags import LaunchFlags
from equipoise.hosts.sglang.launch.settings import Level

Severity = Literal["refused", "trap", "note"]


@dataclass(frozen=True)
class Finding:
    """
    Attributes:
        severity: ``refused``: the launch ends there; ``trap``: it runs, but not as meant; ``note``: worth knowing.
        flag: the flag or variable that causes it.
    """

    severity: Severity
    flag: str
    message: str


@dataclass(frozen=True)
class Launch:
    """What a launch is checked with.

    Attributes:
        plugins: ``SGLANG_PLUGINS``, empty if not set: all plugins then.
        num_logical_experts: of a layer; None where the model is not at hand.
    """

    flags: LaunchFlags
    level: Level
    plugins: str = ""
    num_logical_experts: int | None = None
