"""Models, and what the stock SGLang server answers on one rank without the plugin: what every other run must equal."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.sglang_server import PYTHON, Answers, SglangServer
from helpers.tiny_models import make_tiny_model

# What SGLang asks of a DeepSeek-V2 config beyond what transformers does.
_DEEPSEEK = {
    "moe_layer_freq": 1,
    "scoring_func": "softmax",
    "seq_aux": True,
    "aux_loss_alpha": 0.001,
    "n_group": 1,
    "topk_group": 1,
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "head_dim": 48,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 128,
    },
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("sglang") is not None and not PYTHON.exists():
        pytest.skip("needs the environment of `make test-sglang`")


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three MoE layers of 8 experts."""
    return make_tiny_model(tmp_path_factory.mktemp("qwen"), "qwen3_moe", 0)


@pytest.fixture(scope="session")
def other_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shape, other weights."""
    return make_tiny_model(tmp_path_factory.mktemp("other_qwen"), "qwen3_moe", 1)


@pytest.fixture(scope="session")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One dense layer, then three MoE layers with a shared expert; MLA."""
    return make_tiny_model(tmp_path_factory.mktemp("deepseek"), "deepseek_v2", 0, **_DEEPSEEK)


@pytest.fixture(scope="session")
def qwen_answers(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return stock_answers(qwen, tmp_path_factory)


@pytest.fixture(scope="session")
def other_qwen_answers(other_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return stock_answers(other_qwen, tmp_path_factory)


@pytest.fixture(scope="session")
def deepseek_answers(deepseek: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return stock_answers(deepseek, tmp_path_factory)


def stock_answers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Answers of the stock server on one rank. A fixture's, so that no other server takes its cores meanwhile."""
    with SglangServer(model, log=tmp_path_factory.mktemp("stock") / "server.log") as server:
        return server.answers(concurrency=2)
