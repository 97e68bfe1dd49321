"""Shares as repeated table entries: what a slot is given, over how many rows, in which order."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.hosts.sglang.share_table import MAX_ENTRIES, even_table, share_table


def test_every_replica_once_where_shares_are_equal() -> None:
    table = share_table(np.array([2, 0, 1, 0]), np.array([1, 0.5, 1, 0.5]), 3)
    assert table.tolist() == [[1, 3], [2, -1], [0, -1]]


def test_larger_share_more_entries_without_runs() -> None:
    table = share_table(np.array([0, 0, 1]), np.array([2 / 3, 1 / 3, 1]), 2)
    assert table.tolist() == [[0, 1, 0], [2, -1, -1]]


def test_even_table_takes_no_notice_of_weights() -> None:
    assert even_table(np.array([0, 1, 0]), 2).tolist() == [[0, 2], [1, -1]]


def test_zero_weight_slot_keeps_an_entry() -> None:
    """Every replica stays reachable; SGLang's kernels take the table's entries for valid slots."""
    table = share_table(np.array([0, 0, 1]), np.array([1.0, 0.0, 1.0]), 2)
    assert set(table[0].tolist()) == {0, 1}


@settings(deadline=None)
@given(st.data())
def test_entries_are_the_experts_own_slots_and_follow_the_shares(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 12))
    extra = data.draw(st.lists(st.integers(0, num_experts - 1), max_size=20))
    p2l = np.array(data.draw(st.permutations([*range(num_experts), *extra])))
    raw = np.array(data.draw(st.lists(st.floats(0.05, 1), min_size=len(p2l), max_size=len(p2l))))
    weights = raw / np.bincount(p2l, raw, num_experts)[p2l]
    table = share_table(p2l, weights, num_experts)
    longest = min(MAX_ENTRIES, len(p2l))
    assert table.shape[1] <= longest
    for expert in range(num_experts):
        entries = table[expert][table[expert] >= 0]
        slots = np.flatnonzero(p2l == expert)
        assert sorted(set(entries.tolist())) == slots.tolist()
        assert (table[expert][len(entries) :] == -1).all()
        got = np.array([(entries == slot).mean() for slot in slots])
        even = np.abs(1 / len(slots) - weights[slots]).max()
        assert np.abs(got - weights[slots]).max() <= max(0.02, even)  # within tolerance, or no worse than no repeats
