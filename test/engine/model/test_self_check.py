"""A family that was never tested is compared with transformers at its start, and refused where it differs."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from equipoise.engine.model import self_check
from equipoise.engine.model.blueprint import ModelBlueprint
from equipoise.engine.model.self_check import check_against_transformers
from equipoise.errors import ModelError
from helpers.engine_loop import serve_config
from helpers.tiny_models import make_tiny_model

PROMPT = [3, 10, 17, 24]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("m"), "qwen3_moe", num_hidden_layers=2)


def test_equal_logits_pass_and_others_are_refused(model: Path) -> None:
    blueprint = ModelBlueprint.prepare(serve_config(model))
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        logits = plain(torch.tensor([PROMPT])).logits[0, -1]
    assert check_against_transformers(blueprint, PROMPT, logits, family="never_seen")
    for wrong in (logits.roll(1), logits + 0.1 * torch.randn_like(logits), logits * float("nan")):
        with pytest.raises(ModelError, match="never_seen is not served: its logits differ"):
            check_against_transformers(blueprint, PROMPT, wrong, family="never_seen")


def test_a_tested_family_is_not_compared_and_a_large_one_is_named_in_the_log(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blueprint = ModelBlueprint.prepare(serve_config(model))
    assert not check_against_transformers(blueprint, PROMPT, torch.zeros(258))
    monkeypatch.setattr(self_check, "MAX_CHECKED_BYTES", 1000)
    with caplog.at_level(logging.WARNING, logger="equipoise.engine"):
        assert not check_against_transformers(blueprint, PROMPT, torch.zeros(258), family="never_seen")
    assert "never_seen was never compared" in caplog.text
