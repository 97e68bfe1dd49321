"""Single tokens: the logical experts that each token chose, cut into steps. And shares of subjects (``freq``)."""

from __future__ import annotations

import numpy as np

from equipoise.errors import TraceError
from equipoise.formats.archive import MAX_EXPERTS, read_array, require_size
from equipoise.formats.container import Container
from equipoise.formats.raw_trace import RawTrace, ReadOptions
from equipoise.formats.readers.padding import without_padding

_NAMES = ("topk", "topk_ids", "expert_ids", "routed_experts", "selected_experts")


def is_tokens(container: Container) -> bool:
    return container.kind == "npz" and bool(container.names & set(_NAMES))


def read_tokens(container: Container, options: ReadOptions) -> RawTrace:
    """``topk`` (tokens, L, K) of an .npz; ``seq_lens`` is checked if it is there: it must add up to the tokens."""
    name = next(name for name in _NAMES if name in container.names)
    topk = read_array(container.content, name)
    if "seq_lens" in container.names and topk.ndim == 3:
        lengths = read_array(container.content, "seq_lens")
        if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or int(lengths.sum()) != len(topk):
            raise TraceError(f"seq_lens must add up to the {len(topk)} tokens of {name}, got {int(lengths.sum())}")
    return count_tokens(topk, options, name=name)


def count_tokens(
    topk: np.ndarray, options: ReadOptions, *, name: str = "topk", offsets: np.ndarray | None = None
) -> RawTrace:
    """Counts tokens per step and expert. The last step may be shorter; its tokens count like any other.

    Args:
        topk: (tokens, L, K) ints; -1 stands for no expert.
        offsets: (T + 1,) first token of each step; steps of ``options.tokens_per_step`` if None.

    Raises:
        TraceError: another shape, or an id outside [0, E).
    """
    if topk.ndim != 3 or 0 in topk.shape or topk.dtype.kind not in "iu":
        raise TraceError(f"{name} must be integers (tokens, layers, k), got {topk.dtype} {topk.shape}")
    notes = []
    ids, padding = without_padding(topk)
    if padding:
        notes.append(f"{padding} padding ids are not counted (a token names no expert twice in a layer)")
    highest = int(ids.max())
    num_experts = options.num_logical_experts or highest + 1
    if int(ids.min()) < -1 or highest >= min(num_experts, MAX_EXPERTS):
        limit = min(num_experts, MAX_EXPERTS)
        raise TraceError(f"{name} holds expert ids {int(ids.min())} to {highest}, outside [-1, {limit})")
    if num_experts < 1:
        raise TraceError(f"{name} names no expert at all")
    if options.num_logical_experts is None:
        notes.append(
            f"the number of experts is guessed from the highest id: {num_experts}; --num-logical-experts sets it"
        )
    num_tokens = len(ids)
    if offsets is None:
        offsets = np.append(np.arange(0, num_tokens, options.tokens_per_step), num_tokens)
        notes.append(f"steps are {options.tokens_per_step} consecutive tokens (--tokens-per-step)")
    return RawTrace(
        _bincount(ids, offsets, num_experts),
        metadata={"source": "tokens", "num_tokens": num_tokens, "top_k": topk.shape[2],
                  "tokens_per_step": options.tokens_per_step},
        topk_ids=ids,
        token_offsets=offsets,
        found=f"expert ids of {num_tokens} tokens, top-{topk.shape[2]}",
        notes=tuple(notes),
    )  # fmt: skip


def _bincount(ids: np.ndarray, offsets: np.ndarray, num_experts: int) -> np.ndarray:
    num_steps, num_layers = len(offsets) - 1, ids.shape[1]
    require_size("logical_count", (num_steps, num_layers, num_experts))
    counts = np.zeros((num_steps, num_layers, num_experts), dtype=np.int64)
    layer_offset = np.arange(num_layers)[:, None] * num_experts
    for step in range(num_steps):
        part = ids[offsets[step] : offsets[step + 1]].astype(np.int64)
        keys = (part + layer_offset)[part >= 0]
        counts[step] = np.bincount(keys, minlength=num_layers * num_experts).reshape(num_layers, num_experts)
    return counts


def is_frequencies(container: Container) -> bool:
    return container.kind == "npz" and "freq" in container.names


def read_frequencies(container: Container, _options: ReadOptions) -> RawTrace:
    """One step per subject of ``freq`` (subjects, L, E), the share of its tokens that chose each expert.

    Shares become counts by the subject's ``mean_tokens`` (1000 tokens each where that is missing), rounded.
    """
    freq = read_array(container.content, "freq")
    if freq.ndim != 3 or 0 in freq.shape or freq.shape[2] > MAX_EXPERTS:
        raise TraceError(f"freq must have shape (subjects, layers, experts), got {freq.shape}")
    require_size("logical_count", freq.shape)
    tokens, notes = np.full(freq.shape[0], 1000.0), ["1000 tokens a subject are assumed: mean_tokens is missing"]
    if "mean_tokens" in container.names:
        tokens, notes = read_array(container.content, "mean_tokens"), []
        if tokens.shape != freq.shape[:1]:
            raise TraceError(f"mean_tokens must have shape {freq.shape[:1]}, one per subject, got {tokens.shape}")
    with np.errstate(over="ignore", invalid="ignore"):
        counts = np.rint(freq.astype(np.float64) * tokens.astype(np.float64)[:, None, None])
    return RawTrace(
        counts,
        metadata={"source": "frequencies"},
        found=f"expert shares of {len(freq)} subjects, one step each",
        notes=tuple(notes),
    )
