"""A model for bench-sglang whose text has topics, each with busy experts of its own.

A random model's router spreads any text over all experts, and no placement has anything to gain. Here neighbouring
token ids share part of their embedding and of their output row: a prompt of one topic keeps to its experts, and so does
what is generated after it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from helpers.tiny_models import make_tiny_model

TOPIC_TOKENS, NUM_TOPICS = 40, 5
_EMBEDDING_PART, _OUTPUT_PART = 2.0, 1.0  # of the topic, against 1.0 of the token itself


def make_topical_model(directory: Path, *, layers: int, hidden: int, intermediate: int, num_experts: int) -> Path:
    """Writes it into ``directory``: Qwen3-MoE, float32, byte tokens; topic ``t`` has the ids from ``40 t`` on."""
    make_tiny_model(
        directory,
        "qwen3_moe",
        num_hidden_layers=layers,
        hidden_size=hidden,
        moe_intermediate_size=intermediate,
        num_experts=num_experts,
        max_position_embeddings=1024,
    )
    weights = load_file(directory / "model.safetensors")
    embedding, output = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    topics = torch.randn(NUM_TOPICS + 1, hidden, generator=torch.Generator().manual_seed(7))
    topic_of = (torch.arange(len(embedding)) // TOPIC_TOKENS).clamp(max=NUM_TOPICS)  # the last: no prompt's
    embedding += _EMBEDDING_PART * topics[topic_of]
    output += _OUTPUT_PART * output.std() * topics[topic_of]
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


def topical_prompt(topic: int, number: int) -> list[int]:
    """Six token ids of a topic, others for each ``number``."""
    first = topic % NUM_TOPICS * TOPIC_TOKENS
    return [first + (number + i * 11) % TOPIC_TOKENS for i in range(6)]
