"""Turns prompts into token ids off the event loop, and refuses what cannot fit before it costs anything."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from equipoise.errors import ConfigError

_SHORT_TEXT = 16 * 1024  # characters; above, a text waits for other long ones only


class Tokenizing:
    """Tokenise texts in two lanes, so that a long text holds up long ones at most.

    A fast tokenizer may not be entered by two threads at once: each lane has one thread and a copy of its own. A text
    whose client leaves while it waits is never tokenised.

    Args:
        tokenizer: transformers' tokenizer of the model.
        max_tokens: tokens that a prompt may have.
    """

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        self._tokenizers = (tokenizer, copy.deepcopy(tokenizer))
        self._lanes = tuple(ThreadPoolExecutor(1, f"tokenizing-{name}") for name in ("short", "long"))
        self._max_characters = max_tokens * _longest_token(tokenizer)

    async def token_ids(self, prompt: str | Sequence[int], name: str, *, special_tokens: bool = True) -> list[int]:
        """Tokenise a prompt; ids are taken as they are.

        Args:
            name: of the request's field.
            special_tokens: whether the tokenizer adds those that begin a text; a chat template has them already.

        Raises:
            ConfigError: it holds no token, or more characters than the model's longest prompt can have.
        """
        if not isinstance(prompt, str):
            ids = list(prompt)
        elif len(prompt) > self._max_characters:
            raise ConfigError(
                f"{name} has {len(prompt)} characters, no prompt of more than {self._max_characters} can fit the model",
                field=name,
            )
        else:
            lane = len(prompt) > _SHORT_TEXT
            more = {} if special_tokens else {"add_special_tokens": False}
            work = partial(self._tokenizers[lane], prompt, **more)
            ids = list((await asyncio.get_running_loop().run_in_executor(self._lanes[lane], work))["input_ids"])
        if not ids:
            raise ConfigError(f"{name} must hold at least one token, got none", field=name)
        return ids

    def close(self) -> None:
        """Drop what still waits."""
        for lane in self._lanes:
            lane.shutdown(wait=False, cancel_futures=True)


def _longest_token(tokenizer: Any) -> int:
    """Characters of the longest token; a token of a vocabulary never stands for more."""
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {"x": 0}
    return max((len(token) for token in vocabulary), default=1)
