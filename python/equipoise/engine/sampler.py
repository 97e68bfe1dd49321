"""Samples the next token of a request from its logits."""

from __future__ import annotations

import torch

from equipoise.engine.requests import SamplingParams


class Sampler:
    """Draws the tokens of one request. Its own generator makes it independent of what else is in the batch."""

    def __init__(self, params: SamplingParams, default_seed: int) -> None:
        self._params = params
        self._generator = torch.Generator(device="cpu")
        self._generator.manual_seed(params.seed if params.seed is not None else default_seed)

    @property
    def is_greedy(self) -> bool:
        return self._params.temperature == 0

    def draw(self, logits: torch.Tensor) -> int:
        """One token id from logits of shape (V,), on the CPU."""
        if self.is_greedy:
            return int(logits.argmax())
        probabilities = torch.softmax(logits.float() / self._params.temperature, dim=-1)
        probabilities = _restrict(probabilities, self._params.top_k, self._params.top_p)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def _restrict(probabilities: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Zeroes what top-k and top-p leave out; at least the likeliest token stays. (V,) to (V,), not renormalised."""
    if top_k == -1 and top_p >= 1:
        return probabilities
    ordered, order = probabilities.sort(descending=True, stable=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if top_k != -1:
        keep[top_k:] = False
    if top_p < 1:
        kept_mass = (ordered * keep).sum()
        mass_before = (ordered * keep).cumsum(0) - ordered
        keep &= mass_before < top_p * kept_mass
    keep[0] = True
    return torch.zeros_like(probabilities).scatter(0, order, ordered * keep)
