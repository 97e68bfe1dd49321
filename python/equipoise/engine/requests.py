"""Requests to the engine and events from it: frozen values that cross processes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from equipoise.errors import ConfigError

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_LOGPROBS = 20
"""Alternatives per token that a request may ask for."""


def _require(condition: bool, name: str, value: object, must: str) -> None:
    if not condition:
        raise ConfigError(f"{name} must be {must}, got {value!r}", field=name)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop.

    Raises:
        ConfigError: a value that cannot work; ``field`` names it.
    """

    max_new_tokens: int = 128
    """0: nothing is generated, the prompt is only scored (``prompt_logprobs``)."""
    temperature: float = 1.0
    """0, or too small to divide by, is greedy: the likeliest token."""
    top_k: int = -1
    """Only the ``top_k`` likeliest tokens are drawn from; -1: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability are drawn from, in (0, 1]."""
    min_p: float = 0.0
    """Only tokens at least this times as likely as the likeliest one are drawn from, in [0, 1]."""
    presence_penalty: float = 0.0
    """Taken from the logit of each token that has been generated, in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit once for each time it has been generated, in [-2, 2]."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens in the prompt or the answer are divided by this, negative ones multiplied; above 0."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Added to the logits of tokens: (token id, bias in [-100, 100]) pairs."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these strings."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    """Same seed, same prompt, same answer, whatever else runs; None: the engine counts on from its own seed."""
    logprobs: int | None = None
    """Log probabilities of each new token and of so many of the likeliest ones, before penalties and bias."""
    prompt_logprobs: bool = False
    """The same for the tokens of the prompt, with the first event; needs ``logprobs``."""

    def __post_init__(self) -> None:
        tokens = self.max_new_tokens
        _require(_is_int(tokens) and tokens >= 0, "max_new_tokens", tokens, "an integer of at least 0")
        _require(_is_number(self.temperature) and self.temperature >= 0, "temperature", self.temperature, "0 or more")
        _require(_is_int(self.top_k) and (self.top_k == -1 or self.top_k >= 1), "top_k", self.top_k, "-1 or at least 1")
        _require(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _require(_is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1]")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(_is_number(value) and -2 <= value <= 2, name, value, "in [-2, 2]")
        penalty = self.repetition_penalty
        _require(_is_number(penalty) and 0 < penalty <= 100, "repetition_penalty", penalty, "in (0, 100]")
        for pair in self.logit_bias:
            _require(
                _is_int(pair[0]) and _is_number(pair[1]) and -100 <= pair[1] <= 100,
                "logit_bias",
                pair,
                "token ids with a bias in [-100, 100]",
            )
        self._check_ends()

    def _check_ends(self) -> None:
        _require(
            isinstance(self.stop, tuple) and all(isinstance(text, str) and text for text in self.stop),
            "stop",
            self.stop,
            "strings that are not empty",
        )
        _require(
            isinstance(self.stop_token_ids, tuple) and all(_is_int(token) for token in self.stop_token_ids),
            "stop_token_ids",
            self.stop_token_ids,
            "integers",
        )
        _require(isinstance(self.ignore_eos, bool), "ignore_eos", self.ignore_eos, "true or false")
        seed = self.seed
        _require(seed is None or (_is_int(seed) and 0 <= seed < 2**63), "seed", seed, "None or in [0, 2**63)")
        count = self.logprobs
        _require(
            count is None or (_is_int(count) and 0 <= count <= MAX_LOGPROBS),
            "logprobs",
            count,
            f"None or in [0, {MAX_LOGPROBS}]",
        )


@dataclass(frozen=True)
class GenerateRequest:
    rid: str
    """Names the request; no two running ones may share it."""
    input_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was where it stands."""

    token_id: int
    logprob: float | None  # None: the first token of a prompt, which nothing comes before
    top: tuple[tuple[int, float], ...] = ()  # (token id, log probability), likeliest first


@dataclass(frozen=True)
class TokenEvent:
    """News of one request. The last event of a request, and only that one, has a ``finish_reason``."""

    rid: str
    token_ids: list[int]
    """New tokens. The token that ended the answer (end of sequence, a stop token) is among them."""
    text_delta: str
    """New text. Held back while it may be part of a character or of a stop string; without the stop itself."""
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of ``token_ids``, if the request asks for them."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Of the prompt, in the first event, if the request asks for them."""
    error: str | None = None
    """With the finish reason ``error``: what went wrong with this request alone."""
