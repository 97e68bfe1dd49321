"""Ids that fill up a row and name no choice of a router."""

from __future__ import annotations

import numpy as np

_CHUNK_TOKENS = 1 << 14


def without_padding(topk_ids: np.ndarray) -> tuple[np.ndarray, int]:
    """Ids with padding replaced by -1, and how many ids that were.

    A router picks ``K`` different experts, so an id that a token names twice in a layer is padding, all of its places:
    engines fill rows for CUDA graphs with zeros, or with the last expert.

    Args:
        topk_ids: (tokens, L, K) ints; negative ids are "none" already and stay.
    """
    if topk_ids.shape[-1] < 2:
        return topk_ids, 0
    kept, dropped = topk_ids, 0
    for start in range(0, len(topk_ids), _CHUNK_TOKENS):
        part = topk_ids[start : start + _CHUNK_TOKENS]
        ordered = np.sort(part, axis=-1)
        suspect = ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any(-1)
        if not suspect.any():
            continue
        rows = part[suspect]
        twice = ((rows[:, :, None] == rows[:, None, :]).sum(-1) > 1) & (rows >= 0)
        if kept is topk_ids:
            kept = topk_ids.copy()
        kept[start : start + _CHUNK_TOKENS][suspect] = np.where(twice, -1, rows)
        dropped += int(twice.sum())
    return kept, dropped
