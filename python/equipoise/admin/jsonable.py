"""Replies of commands as JSON values."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from equipoise.manager.reports import RebalanceReport


def jsonable(value: Any) -> Any:
    """``value`` with dataclasses as objects and numbers that JSON has no word for (NaN, infinity) as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(value, RebalanceReport):
            fields["bytes_moved"] = value.bytes_moved
        return fields
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
