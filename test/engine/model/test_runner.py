"""The model side of a rank against the transformers that is installed, whichever that is."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from equipoise.engine.model.runner import cache_keyword
from helpers.engine_loop import PROMPTS, engine_greedy, serve_config
from helpers.tiny_models import make_tiny_model


class Before(torch.nn.Module):
    def forward(self, input_ids: torch.Tensor, past_key_values: object = None) -> None: ...


class Since(torch.nn.Module):
    def forward(self, input_ids: torch.Tensor, cache: object = None) -> None: ...


@pytest.mark.parametrize(("kind", "keyword"), [(Before, "past_key_values"), (Since, "cache")])
def test_the_cache_goes_by_the_name_that_the_model_takes(kind: type, keyword: str) -> None:
    assert cache_keyword(SimpleNamespace(base_model=kind())) == keyword


def test_nothing_that_transformers_will_drop_is_used(tmp_path: Path) -> None:
    config = serve_config(make_tiny_model(tmp_path / "model"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        engine_greedy(config, PROMPTS[:1], 2)
