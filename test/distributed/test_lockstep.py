"""The tests' own communicator finds ranks that call different collectives."""

from __future__ import annotations

import torch

from helpers.lockstep import RanksDiverged
from helpers.run_threads import results_of, run_threads


def test_the_first_call_that_differs_is_named_on_every_rank():
    def body(communicator):
        communicator.barrier()
        if communicator.rank == 2:
            communicator.all_reduce_sum_(torch.zeros(4, dtype=torch.int64), 5.0)
        else:
            communicator.barrier(5.0)

    for outcome in run_threads(body, 3):
        assert isinstance(outcome, RanksDiverged)
        assert "rank 1: call 2, barrier; rank 2: call 2, all_reduce_sum_ of (4,) torch.int64" in str(outcome)


def test_a_posted_sum_of_another_shape_is_found_when_it_is_waited_for():
    def body(communicator):
        communicator.post_sum(torch.zeros(2 + communicator.rank % 1, dtype=torch.int64)).wait(5.0)
        communicator.post_sum(torch.zeros(2, dtype=(torch.int64, torch.int32)[communicator.rank == 1])).wait(5.0)

    for outcome in run_threads(body, 3):
        assert isinstance(outcome, RanksDiverged)
        assert "call 2, post_sum of (2,) torch.int32" in str(outcome)


def test_ranks_in_step_are_left_alone():
    def body(communicator):
        communicator.connect()
        values = torch.ones(3)
        communicator.all_reduce_sum_(values)
        gathered = communicator.all_gather_object(communicator.rank)
        communicator.rebuild()
        communicator.rebuild(control=True)
        return values.tolist(), gathered, communicator.broadcast_object(communicator.rank, 1)

    assert results_of(body, 3) == [([3.0] * 3, [0, 1, 2], 1)] * 3
