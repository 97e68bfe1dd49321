"""Reads from a model's own mask function which tokens a token may attend to: all before it, a window, or its chunk.

A model may window its attention in two ways: by an argument of the attention call, or only in the mask that it has
transformers build. The mask is the truth (transformers' own sdpa and eager attention look at nothing else), so we
register a mask function that builds none, but finds out what it would hold. What is of no known form is refused by
attention: a guess would answer wrongly in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal

import torch

MaskFunction = Callable[..., Any]  # (batch, head, query, key) indices to True where the query may look

_PROBED_POSITIONS = 64
_MIN_PROBED_LENGTH = 512


@dataclass(frozen=True)
class Visibility:
    """What the token at position q may attend to, itself included.

    ========= ======================================
    causal    0 .. q
    sliding   the last ``size`` tokens: q - size + 1 .. q
    chunked   from the start of its chunk of ``size`` tokens: size * (q // size) .. q
    unknown   something else; attention refuses it
    ========= ======================================
    """

    kind: Literal["causal", "sliding", "chunked", "unknown"]
    size: int = 0  # tokens; 0 for causal

    def first(self, position: int) -> int:
        """First entry that the token at ``position`` may attend to."""
        if self.kind == "sliding":
            return max(0, position + 1 - self.size)
        return self.size * (position // self.size) if self.kind == "chunked" else 0

    def within(self, length: int) -> Visibility:
        """The same for contexts of at most ``length`` tokens: causal where the limit is never met."""
        return CAUSAL if self.size >= length else self

    def mask(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """True where ``queries`` may attend to ``keys``: positions, int64, of shapes that broadcast."""
        seen = keys <= queries
        if self.kind == "sliding":
            return seen & (keys > queries - self.size)
        return seen & (keys >= queries // self.size * self.size) if self.kind == "chunked" else seen


CAUSAL = Visibility("causal")
UNKNOWN = Visibility("unknown")

_known: dict[Hashable, Visibility] = {}  # by fingerprint: models build the same few masks anew in every step


def visibility_of_mask(
    *_args: Any, mask_function: MaskFunction, local_size: int | None = None, device: Any = "cpu", **_kwargs: Any
) -> Visibility:
    """Stand in for a mask function of transformers (``ALL_MASK_ATTENTION_FUNCTIONS``).

    Args:
        mask_function: what the mask would be made with.
        local_size: window or chunk, as transformers hands it to mask functions.

    Returns:
        ``UNKNOWN`` for a mask of another form: models also build masks that none of their layers uses.
    """
    key = _fingerprint(mask_function)
    if key not in _known:
        _known[key] = classify(mask_function, local_size, device)
    return _known[key]


def classify(mask_function: MaskFunction, local_size: int | None, device: Any = "cpu") -> Visibility:
    """Find the form of a mask by evaluating it for queries at many positions against all keys."""
    length = max(_MIN_PROBED_LENGTH, 2 * (local_size or 0) + 3)
    queries = torch.linspace(0, length - 1, _PROBED_POSITIONS, device=device).long()[:, None]
    keys = torch.arange(length, device=device)[None]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    found = torch.as_tensor(mask_function(zero, zero, queries, keys)).to(device).expand(len(queries), length)
    candidates = [CAUSAL]
    # A window of its own, that local_size does not tell of, shows in how much the last token sees.
    for size in {local_size or 0, int(found[-1].sum())} - {0}:
        candidates += [Visibility("sliding", size), Visibility("chunked", size)]
    for candidate in candidates:
        if torch.equal(found, candidate.mask(queries, keys)):
            return candidate
    return UNKNOWN


def _fingerprint(value: Any) -> Hashable:
    """Identify a mask function by its code and what it closes over.

    Tensors count by shape alone, to spare a sync: those of padding and blocks are constant here, where no attention
    mask and no token types are ever handed to a model.
    """
    if isinstance(value, torch.Tensor):
        return ("tensor", tuple(value.shape))
    if isinstance(value, tuple | list):
        return tuple(_fingerprint(item) for item in value)
    if callable(value) and hasattr(value, "__code__"):
        cells = getattr(value, "__closure__", None) or ()
        return (value.__code__, tuple(_fingerprint(cell.cell_contents) for cell in cells))
    return value if isinstance(value, Hashable) else id(value)
