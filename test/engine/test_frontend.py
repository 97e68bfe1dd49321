"""Rank 0's side of the engine by itself: what comes through the pipe, and what goes back."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from equipoise.config import EngineConfig
from equipoise.engine import frontend as frontend_module
from equipoise.engine.frontend import Frontend
from equipoise.engine.messages import Abort, Control, Ready, Reply, Stop, Submit, Tokens
from equipoise.engine.requests import GenerateRequest, SamplingParams
from equipoise.engine.step_log import GetSteps, GetStepTotals
from equipoise.manager.command_handler import PendingReply
from equipoise.manager.commands import GetStatus, Rebalance

VOCABULARY = 50


class Tokenizer:
    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(65 + token) for token in ids)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Frontend, Connection]]:
    monkeypatch.setattr(frontend_module, "load_tokenizer", lambda _directory: Tokenizer())
    blueprint: Any = SimpleNamespace(directory=Path(), max_model_len=64, vocab_size=VOCABULARY, eos_token_ids=(0,))
    near, far = Pipe()
    frontend = Frontend(EngineConfig("a/model", max_running_requests=4, random_seed=3), blueprint, far, (11, 12))
    assert near.recv() == Ready(64, VOCABULARY, (0,), (11, 12))
    yield frontend, near
    near.close()
    far.close()


def submit(pipe: Connection, rid: str, **sampling: Any) -> None:
    pipe.send(Submit(GenerateRequest(rid, (5, 6), SamplingParams(**{"ignore_eos": True, **sampling}))))


def logits(count: int) -> torch.Tensor:
    return torch.zeros(count, VOCABULARY)


def run(frontend: Frontend, pipe: Connection, steps: int, first_step: int = 0) -> dict[str, list[int]]:
    """Steps under logits that make every token equally likely; the tokens of each request."""
    tokens: dict[str, list[int]] = {}
    for number in range(first_step, first_step + steps):
        batch = frontend.next_step(idle=False).batch
        assert batch is not None
        frontend.complete(batch, logits(len(batch.sampled)), number, "collecting")
        message = pipe.recv()
        assert isinstance(message, Tokens)
        for event in message.events:
            tokens.setdefault(event.rid, []).extend(event.token_ids)
    return tokens


def test_requests_without_a_seed_draw_differently_and_with_one_alike(ends: tuple[Frontend, Connection]) -> None:
    frontend, pipe = ends
    for rid, seed in (("a", None), ("b", None), ("c", 7), ("d", 7)):
        submit(pipe, rid, seed=seed, max_new_tokens=12)
    tokens = run(frontend, pipe, 12)
    assert tokens["c"] == tokens["d"]
    assert len({tuple(tokens[rid]) for rid in "abc"}) == 3
    assert frontend.next_step(idle=False).batch is None, "all have ended"


def test_greedy_requests_take_the_likeliest_token_beside_others(ends: tuple[Frontend, Connection]) -> None:
    frontend, pipe = ends
    submit(pipe, "greedy", temperature=0.0)
    submit(pipe, "drawn", seed=1)
    batch = frontend.next_step(idle=False).batch
    assert batch is not None
    scores = torch.full((2, VOCABULARY), -100.0)
    scores[0, 17], scores[0, 18], scores[1, 30] = 1.0, 0.9, 100.0
    frontend.complete(batch, scores, 0, "collecting")
    assert {event.rid: event.token_ids for event in pipe.recv().events} == {"greedy": [17], "drawn": [30]}


def test_each_command_is_answered_once_when_its_work_is_done(ends: tuple[Frontend, Connection]) -> None:
    frontend, pipe = ends
    pipe.send(Control(1, Rebalance()))
    pipe.send(Control(2, GetStatus()))
    plan = frontend.next_step(idle=True)
    assert (plan.batch, plan.commands) == (None, (Rebalance(), GetStatus()))
    slow, quick = PendingReply(), PendingReply()
    quick.resolve("status")
    frontend.settle([slow, quick])
    assert pipe.recv() == Reply(2, "status")
    assert frontend.next_step(idle=False).commands == ()
    frontend.settle([])
    assert not pipe.poll(), "nothing new to say"
    slow.resolve("report")
    frontend.settle([])
    frontend.settle([])
    assert pipe.recv() == Reply(1, "report")
    assert not pipe.poll(), "told once"


def test_steps_are_told_by_rank_0_alone(ends: tuple[Frontend, Connection]) -> None:
    frontend, pipe = ends
    submit(pipe, "a", max_new_tokens=3)
    run(frontend, pipe, 3, first_step=40)
    pipe.send(Control(1, GetSteps(41)))
    pipe.send(Control(2, GetStepTotals()))
    assert frontend.next_step(idle=False).commands == ()
    steps = pipe.recv()
    assert [(step.forward_pass_id, step.num_tokens) for step in steps.value] == [(41, 1), (42, 1)]
    assert all(0 < step.seconds < 10 for step in steps.value)
    (totals,) = pipe.recv().value
    assert (totals.phase, totals.num_steps, totals.num_tokens) == ("collecting", 3, 2 + 1 + 1)


def test_an_abort_ends_a_request(ends: tuple[Frontend, Connection]) -> None:
    frontend, pipe = ends
    submit(pipe, "a")
    run(frontend, pipe, 1)
    pipe.send(Abort("a"))
    assert frontend.next_step(idle=False).batch is None
    assert [(event.rid, event.finish_reason) for event in pipe.recv().events] == [("a", "abort")]


@pytest.mark.parametrize("how", ["told", "hung up"])
def test_every_rank_is_stopped_with_the_launcher(ends: tuple[Frontend, Connection], how: str) -> None:
    frontend, pipe = ends
    submit(pipe, "a")
    if how == "told":
        pipe.send(Stop())
    else:
        pipe.close()
    plan = frontend.next_step(idle=True)
    assert (plan.stop, plan.batch) == (True, None)
    again = frontend.next_step(idle=True)  # does not raise, and does not wait
    assert again.stop
