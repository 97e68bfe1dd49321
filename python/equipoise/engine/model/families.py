"""Model families that are tested: served through a forced rebalance, each answers like transformers token by token.

test/engine/test_zoo.py holds this list, and README's table with it.
"""

from __future__ import annotations

# fmt: off
TESTED_FAMILIES = frozenset({
    "afmoe", "axk1", "cohere2_moe", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe",
    "flex_olmo", "gemma4_text", "glm4_moe", "glm4_moe_lite", "gpt_oss", "granitemoe", "granitemoe_swa",
    "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "laguna", "mellum", "mimo_v2_flash", "minimax_m2", "mixtral",
    "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "solar_open",
})
# fmt: on
"""By transformers' ``model_type`` of the text model."""
