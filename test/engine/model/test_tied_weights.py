"""An LM head that config.json ties to the embedding: one tensor where the checkpoint's are equal, else two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from equipoise.engine.checkpoint.reader import Checkpoint
from equipoise.engine.model.blueprint import ModelBlueprint
from equipoise.engine.model.weights import WeightLoader
from helpers.engine_loop import engine_greedy, plain_greedy, serve_config
from helpers.tiny_models import make_tiny_model

PROMPTS = [[1, 2, 3], [9] * 12]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def shares_one_tensor(model: Path) -> bool:
    blueprint = ModelBlueprint.prepare(serve_config(model))
    loader = WeightLoader(blueprint.model, blueprint.experts, Checkpoint(blueprint.directory))
    loader.load([list(range(8)) for _ in blueprint.experts], torch.device("cpu"), with_head=True)
    head, embedding = (blueprint.model.get_parameter(name) for name in (HEAD, EMBEDDING))
    return head.data_ptr() == embedding.data_ptr()


def test_only_the_embedding_is_stored(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "m", "qwen3_moe", tie_word_embeddings=True, max_shard_size="60KB")
    assert len(list(model.glob("*.safetensors"))) > 3
    assert engine_greedy(serve_config(model), PROMPTS, 6) == plain_greedy(model, PROMPTS, 6)
    assert shares_one_tensor(model)


def test_two_that_differ_are_kept_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_tiny_model(tmp_path / "m", "qwen3_moe")
    untied = plain_greedy(model, PROMPTS, 6)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert engine_greedy(serve_config(model), PROMPTS, 6) == untied, "the head in the file answers"
    assert not shares_one_tensor(model)
    assert f"{HEAD} is kept: config.json ties it to {EMBEDDING}" in caplog.text


def test_two_that_are_equal_become_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_tiny_model(tmp_path / "m", "qwen3_moe", tie_word_embeddings=True)
    tensors = load_file(model / "model.safetensors")
    assert HEAD not in tensors
    save_file({**tensors, HEAD: tensors[EMBEDDING].clone()}, model / "model.safetensors", {"format": "pt"})
    assert shares_one_tensor(model)
    assert "is kept" not in caplog.text
