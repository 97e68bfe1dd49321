"""The benchmarks are scripts beside one another: their folder is put on the path for a test, and forgotten after it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmark"
NEIGHBOURS = ("sglang", "vllm", "vllm_ascend", "torch_npu")  # their stand-ins would be taken for the real packages


@pytest.fixture
def benchmark_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARK))
    yield
    for name in set(sys.modules) - before:
        origin = getattr(sys.modules[name], "__file__", None) or ""
        if name.split(".")[0] in NEIGHBOURS or Path(origin).parent == BENCHMARK:
            del sys.modules[name]
