"""What every reader of recorded load returns, before LoadTrace checks it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class RawTrace:
    """The fields of a LoadTrace as a file holds them; see there for shapes and meaning."""

    logical_count: np.ndarray
    forward_pass_ids: np.ndarray | None = None
    physical_count: np.ndarray | None = None
    physical_to_logical_map: np.ndarray | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
