"""Samples the next token of a request from its logits, and says how likely tokens were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from equipoise.engine.requests import SamplingParams, TokenLogprob

_MIN_TEMPERATURE = 1e-5
"""Below, dividing by the temperature overflows or makes no difference: such requests are greedy."""


class Sampler:
    """Draw the tokens of one request. Its own generator makes it independent of what else is in the batch.

    Penalties follow OpenAI's and SGLang's definitions: presence and frequency look at generated tokens, repetition at
    the prompt as well.
    """

    def __init__(self, params: SamplingParams, default_seed: int, prompt: Sequence[int] = ()) -> None:
        self._params = params
        self._generator = torch.Generator(device="cpu")
        self._generator.manual_seed(params.seed if params.seed is not None else default_seed)
        self._generated: Counter[int] = Counter()
        self._prompt = sorted(set(prompt)) if params.repetition_penalty != 1 else []
        self._bias = dict(params.logit_bias)

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the likeliest token of the unchanged logits is the next one."""
        params = self._params
        unchanged = not (params.presence_penalty or params.frequency_penalty or self._bias)
        return self._is_greedy and unchanged and params.repetition_penalty == 1

    @property
    def _is_greedy(self) -> bool:
        return self._params.temperature < _MIN_TEMPERATURE

    def draw(self, logits: torch.Tensor) -> int:
        """Choose a token id from logits of shape (V,), float32, on the CPU.

        Raises:
            RuntimeError: no token has a finite logit.
        """
        logits = self._penalized(logits.float())
        if self._is_greedy:
            return int(logits.argmax())
        # The maximum is taken off first: small temperatures would overflow otherwise.
        probabilities = torch.softmax((logits - logits.max()) / self._params.temperature, dim=-1)
        probabilities = _restrict(probabilities, self._params)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def took(self, token: int) -> None:
        """Count a token as generated."""
        self._generated[token] += 1

    def _penalized(self, logits: torch.Tensor) -> torch.Tensor:
        params = self._params
        if params.repetition_penalty != 1 and (seen := torch.tensor(sorted({*self._prompt, *self._generated}))).numel():
            logits = logits.clone()
            scores = logits[seen]
            factor = params.repetition_penalty
            logits[seen] = torch.where(scores > 0, scores / factor, scores * factor)
        changes = dict(self._bias)
        if params.presence_penalty or params.frequency_penalty:
            for token, count in self._generated.items():
                penalty = params.presence_penalty + params.frequency_penalty * count
                changes[token] = changes.get(token, 0.0) - penalty
        if changes:
            logits = logits.clone()
            logits[torch.tensor(list(changes))] += torch.tensor(list(changes.values()))
        return logits


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Score tokens: row i of ``logits`` (N, V) is for the place of ``tokens[i]``; ``top`` alternatives each."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs[torch.arange(len(tokens)), torch.tensor(tokens, dtype=torch.int64)].tolist()
    values, ids = logprobs.topk(min(top, logprobs.shape[1]), dim=-1)
    pairs = [tuple(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    return [TokenLogprob(*found) for found in zip(tokens, chosen, pairs, strict=True)]


def _restrict(probabilities: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Zero what top-k, top-p and min-p leave out; at least the likeliest token stays. (V,), not renormalised."""
    if params.top_k == -1 and params.top_p >= 1 and params.min_p == 0:
        return probabilities
    ordered, order = probabilities.sort(descending=True, stable=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if params.top_k != -1:
        keep[params.top_k :] = False
    if params.top_p < 1:
        kept_mass = (ordered * keep).sum()
        mass_before = (ordered * keep).cumsum(0) - ordered
        keep &= mass_before < params.top_p * kept_mass
    keep &= ordered >= params.min_p * ordered[0]
    keep[0] = True
    return torch.zeros_like(probabilities).scatter(0, order, ordered * keep)
