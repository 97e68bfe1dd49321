"""Every family of README's table, served by real ranks, answers like transformers through a rebalance."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from equipoise.config import EngineConfig, EplbConfig, ServeConfig
from equipoise.engine.engine import Engine
from equipoise.engine.model.families import TESTED_FAMILIES
from helpers.engine_loop import PROMPTS, plain_greedy
from helpers.model_zoo import FURTHER, MOST_USED
from helpers.served_answers import before_during_after
from helpers.tiny_models import make_tiny_model

NUM_TOKENS = 10
IN_EVERY_RUN = ("qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral", "qwen2_moe:sliding")
ZOO = (*MOST_USED, *FURTHER)


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in IN_EVERY_RUN else [pytest.mark.soak]) for f in ZOO]
)
def test_a_served_family_answers_like_transformers_through_a_rebalance(family: str, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "m", family, seed=3)
    expected = plain_greedy(model, PROMPTS, NUM_TOKENS)
    config = ServeConfig(
        EngineConfig(str(model), ep_size=2, device="cpu", chunked_prefill_size=24, log_level="warning"),
        EplbConfig(ep_num_redundant_experts=2),
    )
    engine = Engine.launch(config)
    try:
        answers, moves = asyncio.run(asyncio.wait_for(before_during_after(engine, NUM_TOKENS), 120))
    finally:
        engine.close()
    assert answers == [expected] * 3
    assert moves > 0


def test_readme_names_the_tested_families_and_no_other() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    table = readme.split("| family | model_type |", 1)[1].split("\n\n", 1)[0]
    named = re.findall(r"`([a-z0-9_]+)`", table)
    assert sorted(named) == sorted(TESTED_FAMILIES)
    assert set(TESTED_FAMILIES) == {name.partition(":")[0] for name in ZOO}
