"""Requests to the engine and events from it: frozen values that cross processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from equipoise.errors import ConfigError

FinishReason = Literal["stop", "length", "abort"]


def _require(condition: bool, name: str, value: object, must: str) -> None:
    if not condition:
        raise ConfigError(f"{name} must be {must}, got {value!r}", field=name)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop.

    Raises:
        ConfigError: a value that cannot work; ``field`` names it.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    """0 is greedy: the likeliest token."""
    top_k: int = -1
    """Only the ``top_k`` likeliest tokens are drawn from; -1: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability are drawn from, in (0, 1]."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these strings."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    """Same seed, same prompt, same answer, whatever else runs; None: the engine counts on from its own seed."""

    def __post_init__(self) -> None:
        tokens = self.max_new_tokens
        _require(_is_int(tokens) and tokens >= 1, "max_new_tokens", tokens, "an integer of at least 1")
        temperature = self.temperature
        _require(
            _is_number(temperature) and 0 <= temperature < float("inf"), "temperature", temperature, "0 or more, finite"
        )
        _require(_is_int(self.top_k) and (self.top_k == -1 or self.top_k >= 1), "top_k", self.top_k, "-1 or at least 1")
        _require(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
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


@dataclass(frozen=True)
class GenerateRequest:
    rid: str
    """Names the request; no two running ones may share it."""
    input_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True)
class TokenEvent:
    """News of one request. The last event of a request, and only that one, has a ``finish_reason``."""

    rid: str
    token_ids: list[int]
    """New tokens. The token that ended the answer (end of sequence, a stop token) is among them."""
    text_delta: str
    """New text. Held back while it may be part of a character or of a stop string; without the stop itself."""
    finish_reason: FinishReason | None = None
