"""The helper of all tests with ranks: what became of a rank that did not return."""

from __future__ import annotations

import os
import time

import pytest

from helpers.run_ranks import RanksFailed, run_ranks


def raise_on_all(rank: int, _world_size: int) -> None:
    raise ValueError(f"rank {rank} says no")


def die_on_rank_1(rank: int, _world_size: int) -> None:
    if rank == 1:
        os._exit(7)


def hang_on_rank_1(rank: int, _world_size: int) -> None:
    time.sleep(60 * rank)


def return_rank(rank: int, _world_size: int) -> int:
    return rank


def test_every_traceback_is_told() -> None:
    with pytest.raises(RanksFailed) as raised:
        run_ranks(raise_on_all, 2)
    for said in ("rank 0 raised", "rank 0 says no", "rank 1 raised", "rank 1 says no"):
        assert said in str(raised.value)


def test_a_rank_that_dies_is_told_from_one_that_is_killed() -> None:
    with pytest.raises(RanksFailed, match=r"rank 1 died without a result \(exit code 7\)"):
        run_ranks(die_on_rank_1, 2)


def test_a_rank_that_hangs_is_killed() -> None:
    with pytest.raises(RanksFailed, match=r"rank 1 was killed: no result in 5 s"):
        run_ranks(hang_on_rank_1, 2, timeout=5)
    assert run_ranks(return_rank, 2) == [0, 1]
