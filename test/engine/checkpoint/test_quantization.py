"""Quantised checkpoints answer like the weights they stand for; what cannot be told is refused, not guessed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from equipoise.engine.model.blueprint import ModelBlueprint
from equipoise.engine.model.runner import ModelRunner
from equipoise.errors import ModelError
from helpers.engine_loop import PROMPTS, engine_greedy, plain_greedy, serve_config
from helpers.tiny_models import make_tiny_model

BLOCK = 16
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}


def configure(model: Path, **fields: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def to_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(R, C) to fp8, its (ceil(R / B), ceil(C / B)) scales, and what the two stand for."""
    rows, columns = weight.shape
    whole = torch.zeros(-(-rows // BLOCK) * BLOCK, -(-columns // BLOCK) * BLOCK)
    whole[:rows, :columns] = weight
    blocks = whole.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # (rb, B, cb, B)
    scales = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-6) / 448.0
    expanded = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :columns]
    stored = (weight / expanded).to(torch.float8_e4m3fn)
    return stored, scales, stored.float() * expanded


def quantize_linear(model: Path, meant: Path) -> None:
    """Rewrites ``model`` as fp8, and ``meant`` as the plain weights that it stands for."""
    stored, plain = {}, {}
    for key, weight in load_file(model / "model.safetensors").items():
        # As DeepSeek-V3 has it: all matrices of layers; embeddings, head, norms and routers stay.
        if weight.ndim == 2 and "layers." in key and not key.endswith("gate.weight") and "norm" not in key:
            stored[key], stored[f"{key}_scale_inv"], plain[key] = to_fp8(weight)
        else:
            stored[key] = plain[key] = weight
    save_file(stored, model / "model.safetensors")
    save_file(plain, meant / "model.safetensors")
    configure(model, quantization_config=FP8)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_block_scaled_fp8_answers_like_the_weights_it_stands_for(family: str, tmp_path: Path) -> None:
    """Shapes like 20 rows in blocks of 16 are there, as DeepSeek-V3 has 576 in blocks of 128."""
    model, meant = (make_tiny_model(tmp_path / name, family, seed=5) for name in ("fp8", "plain"))
    quantize_linear(model, meant)
    assert engine_greedy(serve_config(model), PROMPTS, 6) == plain_greedy(meant, PROMPTS, 6)


def test_each_rank_dequantises_its_own_experts_only(tmp_path: Path) -> None:
    model, meant = (make_tiny_model(tmp_path / name, "qwen3_moe", seed=5) for name in ("fp8", "plain"))
    quantize_linear(model, meant)
    config = serve_config(model, ep_size=4)
    whole = (model / "model.safetensors").stat().st_size
    runner = ModelRunner(ModelBlueprint.prepare(config), 3, torch.device("cpu"), config)
    assert runner.load_report.bytes_read < 0.7 * whole


def test_mxfp4_answers_like_the_weights_it_stands_for(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 32, "head_dim": 16}
    model, meant = (make_tiny_model(tmp_path / name, "gpt_oss", seed=5, **sizes) for name in ("mxfp4", "plain"))
    generator = torch.Generator().manual_seed(1)
    stored, plain = {}, {}
    for key, weight in load_file(model / "model.safetensors").items():
        if key.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = weight.shape
            blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(123, 126, (experts, outputs, inputs // 32), generator=generator, dtype=torch.uint8)
            stored[f"{key}_blocks"], stored[f"{key}_scales"] = blocks, scales
            plain[key] = convert_moe_packed_tensors(blocks, scales).float()
        else:
            stored[key] = plain[key] = weight
    save_file({key: value.contiguous() for key, value in stored.items()}, model / "model.safetensors")
    save_file({key: value.contiguous() for key, value in plain.items()}, meant / "model.safetensors")
    configure(
        model, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    )
    assert engine_greedy(serve_config(model), PROMPTS, 6) == plain_greedy(meant, PROMPTS, 6)


class TestLeftovers:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        return make_tiny_model(tmp_path / "m", "qwen3_moe")

    def load(self, model: Path, **extra: torch.Tensor) -> None:
        tensors = load_file(model / "model.safetensors")
        save_file({**tensors, **extra}, model / "model.safetensors")
        config = serve_config(model)
        ModelRunner(ModelBlueprint.prepare(config), 0, torch.device("cpu"), config)

    @pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_inv", "input_scale"])
    def test_scales_without_a_mark_in_the_configuration_are_refused(self, scale: str, model: Path) -> None:
        with pytest.raises(ModelError, match=f"k_proj.{scale} .* part of a quantised weight"):
            self.load(model, **{f"model.layers.0.self_attn.k_proj.{scale}": torch.ones(1)})

    @pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
    def test_raw_low_precision_weights_are_refused(self, dtype: torch.dtype, model: Path) -> None:
        name = "model.layers.0.self_attn.k_proj.weight"
        weight = load_file(model / "model.safetensors")[name]
        with pytest.raises(ModelError, match=f"{name} .* part of a quantised weight"):
            self.load(model, **{name: weight.to(dtype)})

    def test_tensors_that_nobody_uses_are_named_in_the_log(self, model: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, logger="equipoise.engine"):
            self.load(model, **{"model.layers.9.mystery.weight": torch.ones(2)})
        assert "1 tensors of the checkpoint: model.layers.9.mystery.weight" in caplog.text
