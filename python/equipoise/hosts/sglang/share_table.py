"""Dispatch shares as repeated entries of SGLang's replica table.

Without an a2a backend SGLang's ``dynamic`` dispatch takes entry ``row % num_valid`` of an expert for token ``row``;
with one it takes a random entry. A slot that stands in the table n times out of T is given n / T of the tokens, so
shares need no kernel of ours. Worked number: shares 2/3 and 1/3 become 2 + 1 entries, in the order a b a.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

MAX_ENTRIES = 64
"""Longest table of an expert, and never longer than a layer has slots, which is how wide SGLang's map is. The rows of a
small batch see only the beginning of a long one."""

_TOLERANCE = 0.02
"""How far a share may be from the planned one; the shortest table within is taken."""


def share_table(physical_to_logical: np.ndarray, weights: np.ndarray, num_experts: int) -> np.ndarray:
    """Replica table of one layer.

    Args:
        physical_to_logical: (P,) int64.
        weights: (P,) share of its expert's tokens that a slot takes.
        num_experts: ``E``.

    Returns:
        (E, X) int64 slots, padded with -1; X is the length of the longest table.
    """
    order = np.argsort(physical_to_logical, kind="stable")
    starts = np.searchsorted(physical_to_logical[order], np.arange(num_experts + 1))
    tables = [order[start:end] for start, end in pairwise(starts)]
    for expert in np.flatnonzero(np.diff(starts) > 1).tolist():
        slots = tables[expert]
        longest = min(MAX_ENTRIES, len(order))
        tables[expert] = _repeated(slots, weights[slots].astype(np.float64), longest)
    out = np.full((num_experts, max(len(table) for table in tables)), -1, dtype=np.int64)
    for row, table in enumerate(tables):
        out[row, : len(table)] = table
    return out


def even_table(physical_to_logical: np.ndarray, num_experts: int) -> np.ndarray:
    """:func:`share_table` with every replica once: (E, X) int64."""
    return share_table(physical_to_logical, np.ones(len(physical_to_logical)), num_experts)


def _repeated(slots: np.ndarray, weights: np.ndarray, longest: int) -> np.ndarray:
    """(T <= longest,) entries: each slot in proportion to its weight, at least once, spread over the table."""
    shares = weights / weights.sum() if weights.sum() > 0 else np.full(len(slots), 1 / len(slots))
    totals = np.arange(len(slots), longest + 1)[:, None]
    times = np.maximum(1, np.rint(shares * totals)).astype(np.int64)  # (totals, slots)
    once = np.ones((1, len(slots)), dtype=np.int64)
    times = np.concatenate([once, times[times.sum(1) <= longest]])  # rounding up can make a table longer than its total
    error = np.abs(times / times.sum(1, keepdims=True) - shares).max(1)
    close = np.flatnonzero(error <= _TOLERANCE)
    best = times[close[0] if len(close) else int(error.argmin())]
    # The n-th of T entries of a slot is due at (n + 1/2) / T of the table: no slot comes in runs.
    due = np.concatenate([(np.arange(count) + 0.5) / count for count in best])
    return np.repeat(slots, best)[np.argsort(due, kind="stable")]
