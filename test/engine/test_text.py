"""Requests, detokenising, stop strings and sampling: what a client sees of its tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.engine.detokenizer import IncrementalDetokenizer
from equipoise.engine.requests import SamplingParams
from equipoise.engine.sampler import Sampler
from equipoise.errors import ConfigError


def decode_bytes(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


def told(detokenizer: IncrementalDetokenizer, tokens: bytes) -> list[str]:
    """The text after each token, up to a stop, and the rest."""
    parts = []
    for token in tokens:
        text, stopped = detokenizer.push([token])
        parts.append(text)
        if stopped:
            return parts
    parts.append(detokenizer.finish()[0])
    return parts


class TestDetokenizer:
    def test_a_character_comes_when_its_last_byte_does(self) -> None:
        assert told(IncrementalDetokenizer(decode_bytes), "aé✓".encode()) == ["a", "", "é", "", "", "✓", ""]

    @given(st.binary(max_size=30))
    def test_parts_add_up_to_the_whole_even_for_broken_text(self, tokens: bytes) -> None:
        assert "".join(told(IncrementalDetokenizer(decode_bytes), tokens)) == decode_bytes(list(tokens))

    @given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
    def test_text_ends_before_the_first_stop_string(self, text: str, stop: list[str]) -> None:
        shown = "".join(told(IncrementalDetokenizer(decode_bytes, stop), text.encode()))
        # The first stop to be completed ends the text; of those completed together, the one that begins first.
        ends = [(end, text.find(s)) for s in stop for end in [text.find(s) + len(s)] if s in text]
        first = min((end for end, _ in ends), default=0)
        assert shown == (text[: min(begin for end, begin in ends if end == first)] if ends else text)

    def test_a_possible_stop_is_held_back_only_as_long_as_it_is_one(self) -> None:
        assert told(IncrementalDetokenizer(decode_bytes, ["<end>"]), b"x<en<e.") == [
            "x",
            "",
            "",
            "",
            "<en",
            "",
            "<e.",
            "",
        ]


class TestSamplingParams:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("max_new_tokens", -1),
            ("max_new_tokens", True),
            ("temperature", -0.1),
            ("temperature", float("nan")),
            ("temperature", float("inf")),
            ("temperature", "hot"),
            ("top_k", 0),
            ("top_p", 0.0),
            ("top_p", 1.5),
            ("min_p", 1.5),
            ("min_p", float("nan")),
            ("presence_penalty", 2.5),
            ("frequency_penalty", -2.1),
            ("repetition_penalty", 0.0),
            ("logit_bias", ((3, 101.0),)),
            ("logit_bias", (("3", 1.0),)),
            ("logprobs", 21),
            ("logprobs", True),
            ("stop", ("",)),
            ("stop", ["a"]),
            ("stop_token_ids", (1.5,)),
            ("ignore_eos", 1),
            ("seed", -1),
        ],
    )
    def test_bad_value_names_its_field(self, field: str, value: Any) -> None:
        with pytest.raises(ConfigError, match=field) as caught:
            SamplingParams(**{field: value})
        assert caught.value.field == field


class TestSampler:
    LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.9, -4.0])

    def draws(self, count: int = 400, default_seed: int = 0, **params: Any) -> list[int]:
        sampler = Sampler(SamplingParams(**params), default_seed)
        return [sampler.draw(self.LOGITS) for _ in range(count)]

    def test_temperature_zero_is_the_likeliest(self) -> None:
        assert set(self.draws(3, temperature=0.0)) == {1}

    def test_the_seed_decides(self) -> None:
        assert self.draws(seed=5) == self.draws(seed=5, default_seed=9)
        assert self.draws(seed=5) != self.draws(seed=6)
        assert self.draws(default_seed=1) != self.draws(default_seed=2)

    def test_top_k_and_top_p_leave_the_rest_out(self) -> None:
        assert set(self.draws(top_k=2)) == {1, 3}
        assert set(self.draws(top_p=0.5)) == {1, 3}  # the likeliest alone has less than half
        assert set(self.draws(top_p=0.01)) == {1}
        assert set(self.draws(top_k=3, top_p=0.99)) == {1, 2, 3}

    def test_frequencies_follow_the_probabilities(self) -> None:
        wanted = torch.softmax(self.LOGITS / 2.0, -1)
        counts = torch.bincount(torch.tensor(self.draws(4000, temperature=2.0)), minlength=5) / 4000
        assert (counts - wanted).abs().max() < 0.03
