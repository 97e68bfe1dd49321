"""How many processors this process may use."""

from __future__ import annotations

import os


def available_cpus() -> int:
    """At least 1; honours the process's affinity where the system has such a thing (Linux)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
