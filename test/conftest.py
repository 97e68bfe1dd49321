"""Fixtures that several rooms use."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.tiny_models import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE with 8 experts and byte tokens."""
    return make_tiny_model(tmp_path_factory.mktemp("model"), "qwen3_moe", 0)
