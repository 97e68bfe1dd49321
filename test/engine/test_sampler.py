"""Drawing tokens: penalties, bias and limits by their definitions; what one request breaks, it breaks for itself."""

from __future__ import annotations

from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.config import EngineConfig
from equipoise.engine import frontend as frontend_module
from equipoise.engine.frontend import Frontend
from equipoise.engine.messages import Submit
from equipoise.engine.requests import GenerateRequest, SamplingParams, TokenEvent
from equipoise.engine.sampler import Sampler, token_logprobs

V = 40


def frequencies(params: SamplingParams, logits: torch.Tensor, draws: int = 400) -> torch.Tensor:
    sampler = Sampler(params, 0)
    counts = torch.zeros(len(logits))
    for _ in range(draws):
        counts[sampler.draw(logits)] += 1
    return counts / draws


@pytest.mark.parametrize("temperature", [1e-40, 1e-30, 1e-6, 5e-324])
def test_temperatures_too_small_to_divide_by_are_greedy(temperature: float) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature), 0)
    logits = torch.tensor([3.0, 9.0, -50.0, 8.999])
    assert [sampler.draw(logits) for _ in range(20)] == [1] * 20
    assert sampler.is_plain_greedy


@settings(deadline=None, max_examples=50)
@given(
    st.floats(1e-5, 1e30),
    st.lists(st.integers(-(10**30), 10**30).map(float), min_size=2, max_size=V),
    st.integers(0, 9),
)
def test_any_temperature_draws_a_token_from_any_finite_logits(
    temperature: float, logits: list[float], seed: int
) -> None:
    token = Sampler(SamplingParams(temperature=temperature, seed=seed), 0).draw(torch.tensor(logits))
    assert 0 <= token < len(logits)


def test_min_p_leaves_what_is_unlikely_beside_the_likeliest() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert (frequencies(SamplingParams(min_p=0.5), logits) > 0).tolist() == [True, True, False, False]
    assert (frequencies(SamplingParams(min_p=1.0), logits) > 0).tolist() == [True, False, False, False]


def test_bias_and_penalties_by_their_definitions() -> None:
    logits = torch.tensor([2.0, 1.5, -1.0, 0.0])
    greedy = {"temperature": 0.0}
    assert Sampler(SamplingParams(**greedy, logit_bias=((3, 2.5),)), 0).draw(logits) == 3
    assert Sampler(SamplingParams(**greedy, logit_bias=((0, -100.0),)), 0).draw(logits) == 1
    once = Sampler(SamplingParams(**greedy, presence_penalty=0.6), 0)
    once.took(0)
    once.took(0)
    assert once.draw(logits) == 1, "2.0 - 0.6 is below 1.5, however often it came"
    often = Sampler(SamplingParams(**greedy, frequency_penalty=0.3), 0)
    often.took(0)
    assert often.draw(logits) == 0, "2.0 - 0.3 is above 1.5"
    often.took(0)
    assert often.draw(logits) == 1, "2.0 - 2 * 0.3 is not"
    repeated = Sampler(SamplingParams(**greedy, repetition_penalty=2.0), 0, prompt=[0, 2])
    assert repeated.draw(logits) == 1, "2.0 / 2 is below 1.5"
    assert repeated._penalized(logits).tolist() == [1.0, 1.5, -2.0, 0.0], "negative ones are multiplied"
    assert logits.tolist() == [2.0, 1.5, -1.0, 0.0], "the logits themselves stay"


def test_log_probabilities_are_those_of_the_softmax() -> None:
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(0))
    wanted = torch.log_softmax(logits, -1)
    for row, found in enumerate(token_logprobs(logits, [5, 6, 7], 3)):
        assert found.token_id == 5 + row
        assert found.logprob == pytest.approx(float(wanted[row, 5 + row]), abs=1e-5)
        assert [token for token, _ in found.top] == wanted[row].topk(3).indices.tolist()


class Tokenizer:
    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:  # noqa: ARG002 - transformers' interface
        if 13 in ids:
            raise RuntimeError("no such token")
        return "".join(chr(65 + token) for token in ids)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> tuple[Frontend, Connection]:
    monkeypatch.setattr(frontend_module, "load_tokenizer", lambda _directory: Tokenizer())
    blueprint: Any = SimpleNamespace(directory=Path(), max_model_len=64, vocab_size=V, eos_token_ids=(0,))
    near, far = Pipe()
    frontend = Frontend(EngineConfig("a/model", max_running_requests=4), blueprint, far, (1,))
    near.recv()
    return frontend, near


def one_step(frontend: Frontend, pipe: Connection, logits: torch.Tensor) -> dict[str, TokenEvent]:
    batch = frontend.next_step(idle=False).batch
    assert batch is not None
    frontend.complete(batch, logits, 0, "collecting")
    return {event.rid: event for event in pipe.recv().events}


@pytest.mark.parametrize("broken", ["sampling", "decoding"])
def test_what_one_request_breaks_ends_that_request_alone(broken: str, ends: tuple[Frontend, Connection]) -> None:
    frontend, pipe = ends
    for rid, sampling in (("good", SamplingParams(temperature=0.0)), ("bad", SamplingParams(seed=1))):
        pipe.send(Submit(GenerateRequest(rid, (5, 6), sampling)))
    logits = torch.zeros(2, V)
    logits[0, 7] = 1.0
    logits[1] = float("nan") if broken == "sampling" else torch.nn.functional.one_hot(torch.tensor(13), V) * 1e4
    events = one_step(frontend, pipe, logits)
    assert (events["good"].token_ids, events["good"].finish_reason) == ([7], None)
    assert events["bad"].finish_reason == "error"
    assert events["bad"].error
    logits = torch.zeros(1, V)
    logits[0, 8] = 1.0
    assert one_step(frontend, pipe, logits)["good"].token_ids == [8], "the other goes on"


def test_a_prompt_can_be_scored_and_nothing_generated(ends: tuple[Frontend, Connection]) -> None:
    frontend, pipe = ends
    sampling = SamplingParams(max_new_tokens=0, logprobs=2, prompt_logprobs=True)
    pipe.send(Submit(GenerateRequest("a", (5, 6, 7), sampling)))
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(0))
    event = one_step(frontend, pipe, logits)["a"]
    assert (event.token_ids, event.finish_reason) == ([], "length")
    assert [entry.token_id for entry in event.prompt_logprobs] == [5, 6, 7]
    wanted = torch.log_softmax(logits, -1)
    assert event.prompt_logprobs[0].logprob is None
    assert [entry.logprob for entry in event.prompt_logprobs[1:]] == pytest.approx(
        [float(wanted[0, 6]), float(wanted[1, 7])], abs=1e-5
    )
