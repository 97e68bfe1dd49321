"""Fixtures that several rooms use."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.tiny_models import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE with 8 experts and byte tokens."""
    return make_tiny_model(tmp_path_factory.mktemp("model"), "qwen3_moe", 0)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """`equipoise serve` in this process sets a handler; the next test's stderr is another one."""
    logger = logging.getLogger("equipoise")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])
