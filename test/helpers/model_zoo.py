"""Tiny configurations of the MoE families that are served, by transformers' model_type and variant.

A name with a colon is a variant of a family: other fields, the same code. ``make_tiny_model`` takes either.
"""

from __future__ import annotations

from typing import Any

_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2}
_ROUTED: dict[str, Any] = {"moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 2}
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
_GPT_OSS: dict[str, Any] = {
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
}
_QWEN2: dict[str, Any] = {**_EXPERTS, "shared_expert_intermediate_size": 24, "mlp_only_layers": [1]}

COMMON: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}

MOST_USED: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"head_dim": 12, "norm_topk_prob": True, **_EXPERTS},
    "qwen2_moe": _QWEN2,
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
    "gpt_oss": _GPT_OSS,
}
"""Of every kind of attention, router and expert; these run in every test of the engine."""

FURTHER: dict[str, dict[str, Any]] = {
    "qwen2_moe:sliding": {
        **_QWEN2,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
        "num_hidden_layers": 4,
    },
    "mixtral:sliding": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe:sliding": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "qwen3_moe:tied": {"head_dim": 12, "tie_word_embeddings": True, **_EXPERTS},
    "dots1": {
        "head_dim": 12,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        **_ROUTED,
    },
    "glm4_moe": {
        "head_dim": 12,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        **_ROUTED,
    },
    "glm4_moe_lite": {**_MLA, "q_lora_rank": 16, "n_group": 1, "topk_group": 1},
    "ernie4_5_moe": {"moe_intermediate_size": 24, "moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1},
    "exaone_moe": {
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "sliding_window": 8,
        **_EXPERTS,
    },
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoeshared": {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 16},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 12},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 12},
    "mimo_v2_flash": {"head_dim": 12, "v_head_dim": 10, "sliding_window": 8, **_ROUTED},
    "afmoe": {"head_dim": 12, "sliding_window": 8, "num_dense_layers": 1, **_EXPERTS},
    "axk1": {**_MLA, "q_lora_rank": 16, "n_group": 1, "topk_group": 1},
    "cohere2_moe": {"head_dim": 12, "sliding_window": 8, **_EXPERTS},
    "hy_v3": {"head_dim": 12, **_EXPERTS},
    "laguna": {"head_dim": 12, "sliding_window": 8, "shared_expert_intermediate_size": 24, **_EXPERTS},
    "mellum": {"head_dim": 12, "sliding_window": 8, **_EXPERTS},
    "solar_open": {"head_dim": 12, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, **_ROUTED},
    "granitemoe_swa": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
}
