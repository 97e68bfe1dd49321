"""Every model family gives the answers of plain transformers, on one rank and with its experts on two and four."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from helpers.engine_loop import PROMPTS, engine_greedy, plain_greedy, serve_config
from helpers.run_ranks import run_ranks
from helpers.tiny_models import FAMILIES, make_tiny_model

NUM_TOKENS = 8
PREFILL = 24  # the longest prompt takes several steps, others decode meanwhile
REDUNDANT = {2: 2, 4: 4}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are too small to gain from threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: make_tiny_model(root / family, family, seed=3) for family in FAMILIES}


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> dict[str, list[list[int]]]:
    return {family: plain_greedy(path, PROMPTS, NUM_TOKENS) for family, path in models.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_rank_answers_like_transformers(
    family: str, models: dict[str, Path], expected: dict[str, list[list[int]]]
) -> None:
    config = serve_config(models[family], chunked_prefill_size=PREFILL, max_running_requests=3)
    assert engine_greedy(config, PROMPTS, NUM_TOKENS) == expected[family]


def _answers_on_ranks(rank: int, world_size: int, models: dict[str, Path]) -> dict[tuple[str, int], object]:
    answers: dict[tuple[str, int], object] = {}
    for ep_size in (2, world_size):
        group = dist.new_group(list(range(ep_size)))
        if rank >= ep_size:
            continue
        for family, path in models.items():
            config = serve_config(
                path,
                ep_size=ep_size,
                redundant=REDUNDANT[ep_size],
                chunked_prefill_size=PREFILL,
                max_running_requests=3,
            )
            answers[family, ep_size] = engine_greedy(config, PROMPTS, NUM_TOKENS, rank=rank, group=group)
    return answers


def test_two_and_four_ranks_with_redundant_experts_answer_like_transformers(
    models: dict[str, Path], expected: dict[str, list[list[int]]]
) -> None:
    answers = run_ranks(_answers_on_ranks, 4, models, timeout=240)[0]
    assert len(answers) == 2 * len(FAMILIES)
    wrong = [key for key, tokens in answers.items() if tokens != expected[key[0]]]
    assert not wrong
