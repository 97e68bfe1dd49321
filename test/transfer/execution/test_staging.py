"""The updater's staging: its budget, its pace, and that nothing under way is overwritten."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from equipoise.errors import TransferError
from equipoise.topology import EpTopology
from equipoise.transfer.execution.updater import ExpertLocationUpdater
from equipoise.transfer.planning.plan import plan_transfer
from helpers.migrate import migrate_layer
from helpers.moved_weights import assert_weights, migrate
from helpers.placements import (
    pooled,
    random_map,
    rank_weights,
    same_bytes,
)
from helpers.run_threads import results_of


@pytest.mark.parametrize("rounds_in_flight", [1, 3])
def test_staging_never_exceeds_its_bytes_and_large_layers_move_in_batches(rounds_in_flight):
    topology = EpTopology(4, 2, 6)
    rng = np.random.default_rng(11)
    old, new = random_map(rng, 20, topology, 2), random_map(rng, 20, topology, 2)
    specs = ((torch.float32, (80, 80)), (torch.bfloat16, (4,)))
    row = 80 * 80 * 4
    budget = 2 * row + 2048

    def body(communicator):
        weights = rank_weights(old, communicator.rank, topology, specs)
        updater = ExpertLocationUpdater(
            communicator, topology, weights, staging_bytes=budget, rounds_in_flight=rounds_in_flight
        )
        assert updater.max_staged_experts == 2
        plan = plan_transfer(old, new, topology, max_staged_experts=updater.max_staged_experts)
        maps = []
        reports = [
            migrate_layer(updater, layer, on_commit=lambda batch: maps.append(batch.new_map))[0]
            for layer in plan.layers
        ]
        expected = rank_weights(new, communicator.rank, topology, specs)
        for tensors, right in zip(weights, expected, strict=True):
            assert all(same_bytes(a, b) for a, b in zip(tensors, right, strict=True))
        assert row < max(report.peak_staging_bytes for report in reports) <= budget
        assert len(maps) == sum(len(layer.batches) for layer in plan.layers) > len(reports)
        updater.release_staging()
        return updater.staging_bytes

    assert results_of(body, 4) == [0] * 4


def test_a_duty_below_one_rests_between_rounds():
    topology = EpTopology(2, 1, 3)
    old, new = np.array([[0, 1, 2, 3, 4, 5]]), np.array([[3, 4, 5, 0, 1, 2]])

    def body(communicator):
        ticks, rests = iter(range(1000)), []
        weights = rank_weights(old, communicator.rank, topology)
        updater = ExpertLocationUpdater(
            communicator, topology, weights, duty=0.25, clock=lambda: float(next(ticks)), sleep=rests.append
        )
        migrate_layer(updater, plan_transfer(old, new, topology).layers[0])
        return rests

    for rests in results_of(body, 2):
        assert rests
        assert all(rest >= 3.0 for rest in rests), "three times as long as the round took"


class Watching:
    """A communicator that checks, when messages are waited for, that nobody has changed what was being sent."""

    def __init__(self, communicator):
        self._inner = communicator

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def post(self, sends, recvs):
        inner, posted = self._inner.post(sends, recvs), [(tensor, tensor.clone()) for _, tensor in sends]

        class Pending:
            def wait(self, timeout):
                inner.wait(timeout)
                assert all(torch.equal(now, then) for now, then in posted)

        return Pending()


@pytest.mark.parametrize("in_a_pool", [False, True])
@pytest.mark.parametrize("rounds_in_flight", [1, 2, 5])
def test_what_is_under_way_is_not_overwritten(rounds_in_flight, in_a_pool):
    topology = EpTopology(4, 2, 6)
    rng = np.random.default_rng(4)
    old, new = random_map(rng, 20, topology, 2), random_map(rng, 20, topology, 2)

    def body(communicator):
        weights = rank_weights(old, communicator.rank, topology)
        weights = pooled(weights, rounds_in_flight) if in_a_pool else weights
        migrate(Watching(communicator), topology, old, new, weights, rounds_in_flight=rounds_in_flight)
        assert_weights(weights, new, communicator.rank, topology)

    results_of(body, 4)


def test_a_plan_that_stages_more_than_there_is_room_for_says_how_to_plan():
    topology = EpTopology(2, 1, 4)
    old, new = np.arange(8)[None], np.roll(np.arange(8), 4)[None]

    def body(communicator):
        weights = rank_weights(old, communicator.rank, topology)
        updater = ExpertLocationUpdater(communicator, topology, weights, rounds_in_flight=2)
        with pytest.raises(TransferError, match=r"stages 4 experts .* holds 2: plan with max_staged_experts=2"):
            migrate_layer(updater, plan_transfer(old, new, topology).layers[0])
        assert_weights(weights, old, communicator.rank, topology)

    results_of(body, 2)
