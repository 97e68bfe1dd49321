"""What the engine's log says of a rebalance."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from equipoise.manager.reports import describe, summarize_balance
from equipoise.transfer.execution.profile import LayerProfile
from helpers.fake_engine import REPORT


def test_one_line_says_what_moved_or_why_nothing_did() -> None:
    line = describe(REPORT, profile=False)
    assert line == (
        "rebalance after step 7: committed: balancedness 0.500 can become 0.900; "
        "2 experts moved, 0.00 MB over a wire, steps waited 5.0 ms; "
        "before: worst layer 0 at 0.500, all tokens 0.500, PAR 2.000 (2.000 to 2.000), "
        "after: worst layer 0 at 0.900, all tokens 0.900, PAR 1.100 (1.100 to 1.100)"
    )
    failed = dataclasses.replace(REPORT, outcome="failed", error="a peer left")
    assert describe(failed, profile=False) == "rebalance after step 7: failed: a peer left"
    skipped = dataclasses.replace(
        REPORT, outcome="skipped", reason="all is well", balance_before=None, balance_after=None
    )
    assert describe(skipped, profile=False) == "rebalance after step 7: skipped: all is well"


def test_the_profile_is_a_table_with_a_line_per_commit() -> None:
    layers = [
        LayerProfile(3, 0.001, 0.002, 0.003, 4096, 5, 1024, 9999),
        LayerProfile(9, 0.01, 0.02, 0.03, 8192, 6, 1024, 9999),
        LayerProfile(11, 0.01, 0.02, None, 8192, 6, 1024, 9999),  # queued on a GPU that has not come to it
    ]
    report = dataclasses.replace(REPORT, profile=dataclasses.replace(REPORT.profile, layers=layers))
    first, *rows = describe(report, profile=True).splitlines()
    assert first == describe(report, profile=False)
    milliseconds = {row[2:42].strip(): float(row[42:].split()[0]) for row in rows[:9]}
    assert milliseconds == {
        "load gathered from all ranks": 1.0,
        "placement planned": 2.0,
        "transfer planned": 3.0,
        "plan broadcast, and waited for a step": 10.0 - 1.0 - 2.0 - 3.0,
        "migrated, first start to last commit": 20.0,
        "transfers": 21.0,
        "checks and votes": 42.0,
        "commits": 33.0,
        "steps waited, in all": 5.0,
    }
    assert any(row.split()[-4:] == ["640", "bytes", "a", "rank"] for row in rows)
    assert [row.split() for row in rows[-3:]] == [
        ["3", "5", "4,096", "1.00", "2.00", "3.00"],
        ["9", "6", "8,192", "10.00", "20.00", "30.00"],
        ["11", "6", "8,192", "10.00", "20.00", "-"],
    ]


def test_a_summary_weighs_layers_alike_and_by_load_and_names_the_worst() -> None:
    load = np.array([[4.0, 0, 0, 0], [0, 0, 0, 0], [100, 100, 100, 100], [60, 20, 60, 60]])
    summary = summarize_balance(load, [3, 5, 7, 9])
    assert summary is not None
    assert summary.mean == pytest.approx((0.25 + 1 + 50 / 60) / 3)
    assert summary.load_weighted == pytest.approx((1 + 100 + 50) / (4 + 100 + 60))
    assert (summary.worst, summary.worst_layer) == (0.25, 3)
    assert (summary.par_max, summary.par_min) == (4.0, 1.0)
    assert summary.par_mean == pytest.approx((4 + 1 + 1.2) / 3)
    assert summarize_balance(np.zeros((2, 4)), [0, 1]) is None
