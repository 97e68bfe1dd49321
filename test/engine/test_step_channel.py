"""Plans of any size reach every rank whole."""

from __future__ import annotations

import torch.distributed as dist

from equipoise.engine.model.step_batch import Segment, StepBatch
from equipoise.engine.step_channel import StepChannel, StepInput
from equipoise.manager.commands import Rebalance
from helpers.run_ranks import run_ranks

SIZES = (1, 10, 1300, 1360, 2000, 30_000, 3)  # tokens: plans of some bytes up to many frames, and a small one after


def plans() -> list[StepInput]:
    made = [
        StepInput(StepBatch((Segment(0, 0, size),), tuple(range(1000, 1000 + size)), (0,)), (Rebalance("equipoise"),))
        for size in SIZES
    ]
    return [*made, StepInput(), StepInput(stop=True)]


def talk(rank: int, _world_size: int) -> list[StepInput]:
    channel = StepChannel(dist.group.WORLD, rank)
    if rank == 0:
        for plan in plans():
            channel.send(plan)
        return plans()
    found = [channel.receive()]
    while not found[-1].stop:
        found.append(channel.receive())
    return found


def test_plans_of_any_size_arrive_whole_and_in_order() -> None:
    assert run_ranks(talk, 3) == [plans()] * 3
