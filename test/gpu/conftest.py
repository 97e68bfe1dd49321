"""Tests that need a GPU are skipped, with a word, where there is none; so are those that need more than there are."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    count = torch.cuda.device_count()
    for item in items:
        mark = item.get_closest_marker("gpu")
        needed = int(mark.kwargs.get("count", 1)) if mark is not None else 0
        if needed > count:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPU(s), this machine has {count}"))
