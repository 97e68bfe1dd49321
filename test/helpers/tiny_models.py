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

from helpers.model_zoo import COMMON, FURTHER, MOST_USED

EOS, PAD = "<eos>", "<pad>"

FAMILIES = MOST_USED
_ZOO = {**MOST_USED, **FURTHER}


def make_tiny_model(directory: Path, family: str = "qwen3_moe", seed: int = 0, **config_overrides: Any) -> Path:
    """Writes a random model of ``family`` into ``directory`` (made if missing) and returns that directory.

    ``config_overrides`` replace fields of the family's config (``num_experts=16``, ``num_hidden_layers=2``, ...);
    ``max_shard_size`` is passed on to ``save_pretrained``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    max_shard_size = config_overrides.pop("max_shard_size", "5GB")
    fields = {
        **COMMON,
        **_ZOO[family],
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        **config_overrides,
    }
    config = AutoConfig.for_model(family.partition(":")[0], **fields)
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
