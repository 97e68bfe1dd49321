"""The npz traces of published routing studies: one row per token (``topk``), or one per subject (``freq``)."""

from __future__ import annotations

import zipfile

import numpy as np

from equipoise.errors import TraceError
from equipoise.formats.archive import MAX_EXPERTS, array_names, read_array, require_size
from equipoise.formats.raw_trace import RawTrace


def read_token_trace(archive: zipfile.ZipFile, tokens_per_step: int, num_logical_experts: int | None) -> RawTrace:
    """Cuts ``topk`` (tokens, L, K), the logical experts of each token, into steps of consecutive tokens.

    The last step may be shorter; its tokens count like any other. -1 stands for no expert. ``seq_lens`` is checked
    if it is there: it must add up to the tokens. Without ``num_logical_experts`` the highest id says how many there
    are.
    """
    topk = read_array(archive, "topk")
    if topk.ndim != 3 or 0 in topk.shape or topk.dtype.kind not in "iu":
        raise TraceError(f"topk must be integers (tokens, layers, k), got {topk.dtype} {topk.shape}")
    lowest, highest = int(topk.min()), int(topk.max())
    num_experts = num_logical_experts or highest + 1
    if lowest < -1 or highest >= min(num_experts, MAX_EXPERTS):
        raise TraceError(f"topk holds expert ids {lowest} to {highest}, outside [-1, {min(num_experts, MAX_EXPERTS)})")
    if num_experts < 1:
        raise TraceError("topk names no expert at all")
    num_tokens, num_layers, _ = topk.shape
    if "seq_lens" in array_names(archive):
        lengths = read_array(archive, "seq_lens")
        if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or int(lengths.sum()) != num_tokens:
            raise TraceError(f"seq_lens must add up to the {num_tokens} tokens of topk, got {int(lengths.sum())}")
    num_steps = -(-num_tokens // tokens_per_step)
    require_size("logical_count", (num_steps, num_layers, num_experts))
    counts = np.zeros((num_steps, num_layers, num_experts), dtype=np.int64)
    layer_offset = np.arange(num_layers)[:, None] * num_experts
    for step in range(num_steps):
        ids = topk[step * tokens_per_step : (step + 1) * tokens_per_step].astype(np.int64)
        keys = (ids + layer_offset)[ids >= 0]
        counts[step] = np.bincount(keys, minlength=num_layers * num_experts).reshape(num_layers, num_experts)
    return RawTrace(counts, metadata={"source": "tokens", "num_tokens": num_tokens, "tokens_per_step": tokens_per_step})


def read_frequency_trace(archive: zipfile.ZipFile) -> RawTrace:
    """One step per subject of ``freq`` (subjects, L, E), the share of its tokens that chose each expert.

    Shares become counts by the subject's ``mean_tokens`` (1000 tokens each where that is missing), rounded.
    """
    freq = read_array(archive, "freq")
    if freq.ndim != 3 or 0 in freq.shape or freq.shape[2] > MAX_EXPERTS:
        raise TraceError(f"freq must have shape (subjects, layers, experts), got {freq.shape}")
    require_size("logical_count", freq.shape)
    tokens = np.full(freq.shape[0], 1000.0)
    if "mean_tokens" in array_names(archive):
        tokens = read_array(archive, "mean_tokens")
        if tokens.shape != freq.shape[:1]:
            raise TraceError(f"mean_tokens must have shape {freq.shape[:1]}, one per subject, got {tokens.shape}")
    with np.errstate(over="ignore", invalid="ignore"):
        counts = np.rint(freq.astype(np.float64) * tokens.astype(np.float64)[:, None, None])
    return RawTrace(counts, metadata={"source": "frequencies"})
