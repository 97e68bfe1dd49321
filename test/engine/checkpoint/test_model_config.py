"""Configurations: foreign code is never run, and a refusal says what would do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from equipoise.engine.checkpoint.files import load_tokenizer
from equipoise.engine.checkpoint.model_config import read_config
from equipoise.errors import ModelError
from helpers.tiny_models import make_tiny_model

CODE = "from transformers import PretrainedConfig\nopen({mark!r}, 'w').close()\nclass Config(PretrainedConfig): pass\n"


def bring_code(directory: Path, mark: Path, **fields: object) -> None:
    (directory / "foreign.py").write_text(CODE.format(mark=str(mark)))
    for name in ("config.json", "tokenizer_config.json"):
        path = directory / name
        content = json.loads(path.read_text()) if path.exists() else {}
        auto_map = {"AutoConfig": "foreign.Config", "AutoTokenizer": ["foreign.Tokenizer", None]}
        path.write_text(json.dumps({**content, **fields, "auto_map": auto_map}))


def test_code_in_the_directory_of_an_unknown_model_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    bring_code(tmp_path, mark, model_type="made_up")
    with pytest.raises(ModelError, match="brings code of its own .*never runs") as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)
    assert not mark.exists()


def test_code_beside_a_known_model_is_left_alone(tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    model = make_tiny_model(tmp_path / "m")
    bring_code(model, mark)
    assert read_config(model).model_type == "qwen3_moe"
    assert load_tokenizer(model)("a")["input_ids"]
    assert not mark.exists()


@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        ("qwen3_vl_moe", "text model, 'qwen3_vl_moe_text', cannot be served by itself"),
        ("mistral3", "text model, 'mistral', can be served once it is saved"),
        ("bert", "no causal language model|wraps|cannot be"),
    ],
)
def test_a_wrapper_says_which_text_model_would_do(model_type: str, says: str, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    if model_type == "bert":
        read_config(tmp_path)  # it has a causal head; what it lacks is experts, which is found later
        return
    with pytest.raises(ModelError, match=says) as caught:
        read_config(tmp_path)
    assert len(str(caught.value)) < 300
