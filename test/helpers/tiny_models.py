"""Tiny random MoE model directories, one per family, with a byte-level tokenizer so that text works.

The weights are drawn large enough that each expert changes the answer: a token sent to a wrong expert, or to a slot
that holds another one, gives different greedy text.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

EOS, PAD = "<eos>", "<pad>"

_COMMON: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "head_dim": 12,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "qwen2_moe": {
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3},
    "deepseek_v2": {**_MLA, "n_group": None, "topk_group": None, "topk_method": "greedy"},
    "deepseek_v3": {**_MLA, "q_lora_rank": 16, "n_group": 4, "topk_group": 2},
    "gemma4_text": {
        "head_dim": 12,
        "global_head_dim": 12,
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
        "hidden_size_per_layer_input": 0,
        "sliding_window": 8,
    },
    "gpt_oss": {
        "head_dim": 12,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
    },
}


def make_tiny_model(directory: Path, family: str = "qwen3_moe", seed: int = 0, **config_overrides: Any) -> Path:
    """Writes a random model of ``family`` into ``directory`` (made if missing) and returns that directory.

    ``config_overrides`` replace fields of the family's config (``num_experts=16``, ``num_hidden_layers=2``, ...);
    ``max_shard_size`` is passed on to ``save_pretrained``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    max_shard_size = config_overrides.pop("max_shard_size", "5GB")
    fields = {
        **_COMMON,
        **FAMILIES[family],
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        **config_overrides,
    }
    config = AutoConfig.for_model(family, **fields)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _randomise_(model)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(directory)
    generation = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, ids 0..255 in the order of the byte-level alphabet, then ``<eos>`` and ``<pad>``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS, pad_token=PAD)


@torch.no_grad()
def _randomise_(model: torch.nn.Module) -> None:
    for name, param in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if "norm" in name:
            param.copy_(1 + 0.1 * torch.randn_like(param))
        elif "bias" in leaf or "sinks" in leaf or param.ndim == 1:
            param.copy_(0.3 * torch.randn_like(param))
        elif "embed_tokens" in name:
            param.copy_(torch.randn_like(param))
        else:
            # gpt-oss stores (experts, in, out), everyone else (..., out, in): the spread of the output is what counts.
            transposed = param.ndim == 3 and type(model).__name__.startswith("GptOss")
            fan_in = param.shape[-2] if transposed else param.shape[-1]
            param.copy_(torch.randn_like(param) * (1.5 / math.sqrt(fan_in)))
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            buffer.copy_(0.2 * torch.randn_like(buffer))
