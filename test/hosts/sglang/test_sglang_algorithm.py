"""Level `algorithm`, without SGLang: what its rebalance is planned from, and in which shape the plan goes back."""

from __future__ import annotations

import numpy as np
import pytest

from equipoise.hosts.sglang.algorithm import Maps, OwnAlgorithm, compute_algorithm, plan_maps, windows_of_steps
from equipoise.placement.balancedness import balancedness
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology

TOPOLOGY = EpTopology(2, 1, 6)
TRIVIAL = np.tile(np.arange(12) % 8, (2, 1))


def plan(steps: np.ndarray, *, current: np.ndarray | None = TRIVIAL, weighted: bool = True, oldest: int = 0) -> Maps:
    return plan_maps(
        steps,
        TOPOLOGY,
        algorithm="equipoise",
        current=current,
        num_groups=None,
        oldest_step=oldest,
        counted_times=2,
        weighted=weighted,
        num_threads=1,
    )


def skewed_steps(num_steps: int = 6) -> np.ndarray:
    steps = np.full((num_steps, 2, 8), 20, dtype=np.int32)
    steps[:, :, 6:] = 400
    return steps


def test_windows_keep_the_order_and_leave_empty_passes_out() -> None:
    steps = np.zeros((5, 1, 2), dtype=np.int32)
    steps[[0, 2, 3], 0, 0] = [1, 2, 4]
    assert windows_of_steps(steps, 2)[:, 0, 0].tolist() == [3, 4]
    assert windows_of_steps(steps, 8)[:, 0, 0].tolist() == [1, 2, 4]
    assert windows_of_steps(np.zeros((5, 1, 2)), 8).shape == (0, 1, 2)


@pytest.mark.parametrize("weighted", [True, False])
def test_plan_comes_back_in_sglangs_shapes(weighted: bool) -> None:
    p2l, l2p, count = plan(skewed_steps(), weighted=weighted)
    assert p2l.shape == (2, 12)
    assert l2p.shape[:2] == count.shape == (2, 8)
    assert l2p.shape[2] <= 12  # SGLang pads it to the number of slots
    for layer in range(2):
        assert np.bincount(p2l[layer], minlength=8).tolist() == count[layer].tolist()
        for expert in range(8):
            entries = l2p[layer, expert][l2p[layer, expert] >= 0]
            assert set(entries.tolist()) == set(np.flatnonzero(p2l[layer] == expert).tolist())
            assert weighted or len(entries) == count[layer, expert]


def test_plan_starts_from_the_placement_in_force() -> None:
    steps = skewed_steps()
    live, planned, from_nothing = (
        ExpertLocationMetadata.from_physical_to_logical(np.asarray(p2l), 8, TOPOLOGY)
        for p2l in (TRIVIAL, plan(steps)[0], plan(steps, current=None)[0])
    )
    load = steps.sum(0)
    assert balancedness(load, planned).mean() > balancedness(load, live).mean()
    assert 0 < live.diff(planned).moves.sum() < live.diff(from_nothing).moves.sum()


def test_nothing_recorded_changes_nothing() -> None:
    p2l, _, _ = plan(np.zeros((6, 2, 8), dtype=np.int32))
    assert np.array_equal(p2l.numpy(), TRIVIAL)


def test_first_placement_needs_no_placement_before_it() -> None:
    p2l, _, _ = plan(skewed_steps(), current=None)
    assert set(p2l[0].tolist()) == set(range(8))


def test_the_ring_begins_where_sglang_goes_on_writing() -> None:
    """Two loads one after the other: what is planned depends on which came last, not on where it lies in the ring."""
    steps = skewed_steps(8)
    steps[:4, :, :] = 20
    steps[:4, :, :2] = 400
    in_order = plan(steps)
    rotated = plan(np.roll(steps, 3, axis=0), oldest=3)
    assert all(np.array_equal(a.numpy(), b.numpy()) for a, b in zip(in_order, rotated, strict=True))


def test_only_names_of_ours_are_taken_from_sglang() -> None:
    def stock(raw_algorithm: str, *_: object) -> str:
        return f"stock {raw_algorithm}"

    assert compute_algorithm(stock, "equipoise", None, 1) == OwnAlgorithm("equipoise")
    assert compute_algorithm(stock, "deepseek", None, 1) == "stock deepseek"
    assert compute_algorithm(stock, "auto", None, 1) == "stock auto"
