"""The updater on ranks that are threads: every slot's bytes against the oracle, and what a failure leaves behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from equipoise.distributed.in_memory import InMemoryHub
from equipoise.errors import ConfigError, PlanMismatchError, TransferError, TransferTimeout, VerificationError
from equipoise.topology import EpTopology
from equipoise.transfer.execution.updater import ExpertLocationUpdater
from equipoise.transfer.planning.plan import plan_transfer
from equipoise.transfer.planning.rank_program import rank_program
from helpers.migrate import migrate_layer
from helpers.moved_weights import assert_weights, migrate, migrate_layers
from helpers.placements import (
    WEIGHT_SPECS,
    expert_row,
    live_weights,
    perturbed,
    pooled,
    random_map,
    random_topology,
    rank_weights,
    same_bytes,
)
from helpers.run_threads import results_of, run_threads


class Counting:
    """A communicator that counts the bytes that its rank posts, by peer."""

    def __init__(self, communicator):
        self._inner = communicator
        self._sent, self._received = np.zeros((2, communicator.world_size), np.int64)

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def post(self, sends, recvs):
        for counted, messages in ((self._sent, sends), (self._received, recvs)):
            for peer, tensor in messages:
                counted[peer] += tensor.nbytes
        return self._inner.post(sends, recvs)

    def take(self, topology):
        """Since the last call: sent, received, sent to and received from other nodes."""
        node = [topology.node_of_rank(rank) for rank in range(topology.num_ranks)]
        elsewhere = np.array(node) != node[self._inner.rank]
        counted = [self._sent, self._received, self._sent * elsewhere, self._received * elsewhere]
        counted = [int(counts.sum()) for counts in counted]
        self._sent[:] = self._received[:] = 0
        return counted


@pytest.mark.parametrize("spare_rows", [None, 1, 5], ids=["stacked", "one-spare-row", "five-spare-rows"])
@pytest.mark.parametrize("verification", ["off", "canary"])
@pytest.mark.parametrize("seed", range(20))
def test_random_placements_end_as_the_oracle_says(seed, verification, spare_rows):
    rng = np.random.default_rng(seed)
    topology = random_topology(rng, int(rng.integers(1, 7)))
    num_experts = int(rng.integers(1, topology.num_slots + 1))
    old = random_map(rng, num_experts, topology, 2)
    new = perturbed(rng, old, num_experts) if seed % 2 else random_map(rng, num_experts, topology, 2)

    def body(communicator):
        weights = rank_weights(old, communicator.rank, topology)
        if spare_rows is not None:
            weights = pooled(weights, spare_rows)
        wire = Counting(communicator)
        layers = migrate_layers(wire, topology, old, new, weights, verification=verification)
        reports = [(report, wire.take(topology)) for report in layers]
        assert_weights(weights, new, communicator.rank, topology)
        return reports

    per_rank = results_of(body, topology.num_ranks)
    for of_ranks in zip(*per_rank, strict=True):  # of one layer
        reports, counted = zip(*of_ranks, strict=True)
        assert all(np.array_equal(report.bytes_over_ranks, counted) for report in reports)
        assert [report.bytes_received for report in reports] == [received for _, received, _, _ in counted]


@pytest.mark.parametrize("in_a_pool", [False, True])
def test_large_rows_travel_apart_from_small_ones(in_a_pool):
    topology = EpTopology(2, 1, 2)
    old, new = np.array([[0, 1, 2, 3]]), np.array([[2, 1, 0, 3]])
    specs = ((torch.float32, (80, 80)), (torch.bfloat16, (4,)), (torch.float16, (128, 100)))

    def body(communicator):
        weights = rank_weights(old, communicator.rank, topology, specs)
        weights = pooled(weights, 1) if in_a_pool else weights
        report = migrate(communicator, topology, old, new, weights)[0]
        expected = rank_weights(new, communicator.rank, topology, specs)
        assert all(same_bytes(a, b) for a, b in zip(live_weights(weights)[0], expected[0], strict=True))
        return report

    reports = results_of(body, 2)
    rows = 80 * 80 * 4 + 128 * 100 * 2
    assert all(rows < report.bytes_received < rows + 1024 for report in reports)


def test_bytes_of_a_small_plan_per_rank_and_over_nodes():
    topology = EpTopology(4, 2, 2)
    before, after = np.array([[0, 1, 2, 3, 4, 5, 6, 5]]), np.array([[2, 1, 0, 3, 4, 6, 1, 5]])

    def body(communicator):
        weights = rank_weights(before, communicator.rank, topology)
        return migrate(communicator, topology, before, after, weights)[0]

    reports = results_of(body, 4)
    one = reports[2].bytes_received  # rank 2 takes expert 6 from rank 3 and nothing else
    assert one > sum(expert_row(0, 6, *spec).nbytes for spec in WEIGHT_SPECS)
    # Ranks 0 and 1 exchange experts 0 and 2; rank 0 also sends expert 1 across, to rank 3.
    experts = np.array([[2, 1, 1, 0], [1, 1, 0, 0], [0, 1, 0, 0], [1, 1, 0, 1]])
    assert all(np.array_equal(report.bytes_over_ranks, one * experts) for report in reports)


def test_ranks_with_different_plans_move_nothing():
    topology = EpTopology(2, 1, 2)
    old = np.array([[0, 1, 2, 3]])
    news = [np.array([[2, 1, 0, 3]]), np.array([[3, 1, 2, 0]])]

    def body(communicator):
        weights = rank_weights(old, communicator.rank, topology)
        try:
            migrate(communicator, topology, old, news[communicator.rank], weights)
        finally:
            assert_weights(weights, old, communicator.rank, topology)

    outcomes = run_threads(body, 2)
    assert all(isinstance(outcome, PlanMismatchError) for outcome in outcomes)
    assert "ranks [1] hold another transfer plan" in str(outcomes[0])


class Meddling:
    """A communicator that does something to one rank's outgoing messages."""

    def __init__(self, communicator, meddle):
        self._inner, self._meddle = communicator, meddle

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def post(self, sends, recvs):
        return self._inner.post(self._meddle(list(sends)), recvs)


@pytest.mark.parametrize("in_a_pool", [False, True])
@pytest.mark.parametrize("bad_rank", [0, 2])
def test_a_wrong_expert_on_the_wire_is_caught_on_every_rank_before_anything_changes(bad_rank, in_a_pool):
    topology = EpTopology(3, 1, 2)
    old, new = np.array([[0, 1, 2, 3, 4, 5]]), np.array([[2, 1, 4, 3, 0, 5]])

    def body(communicator):
        weights = rank_weights(old, communicator.rank, topology)
        weights = pooled(weights, 2) if in_a_pool else weights
        wrong = torch.full((4096,), 7, dtype=torch.uint8)

        def other_expert(sends):
            return [(peer, wrong[: tensor.numel()]) for peer, tensor in sends]

        wire = Meddling(communicator, other_expert) if communicator.rank == bad_rank else communicator
        try:
            migrate(wire, topology, old, new, weights)
        finally:
            assert_weights(weights, old, communicator.rank, topology)

    outcomes = run_threads(body, 3)
    assert all(isinstance(outcome, VerificationError) for outcome in outcomes), outcomes
    assert f"rank {bad_rank} was to send" in str(outcomes[1])


@pytest.mark.parametrize("in_a_pool", [False, True])
def test_a_lost_message_times_out_on_every_rank_and_a_later_attempt_succeeds(in_a_pool):
    topology = EpTopology(3, 1, 2)
    old, new = np.array([[0, 1, 2, 3, 4, 5]]), np.array([[2, 1, 4, 3, 0, 5]])

    def body(communicator):
        weights = rank_weights(old, communicator.rank, topology)
        weights = pooled(weights, 2) if in_a_pool else weights
        lost = [communicator.rank == 1]

        def drop_once(sends):
            return [] if lost and lost.pop() else sends

        updater = ExpertLocationUpdater(Meddling(communicator, drop_once), topology, weights, timeout=0.5)
        plan = plan_transfer(old, new, topology)
        with pytest.raises(TransferTimeout, match="layer 0 was not migrated"):
            migrate_layer(updater, plan.layers[0])
        assert_weights(weights, old, communicator.rank, topology)
        assert updater.error is None
        migrate_layer(updater, plan.layers[0])
        assert_weights(weights, new, communicator.rank, topology)

    results_of(body, 3)


def test_an_exception_on_one_rank_reaches_all_with_its_words():
    topology = EpTopology(2, 1, 2)
    old, new = np.array([[0, 1, 2, 3]]), np.array([[2, 1, 0, 3]])

    def body(communicator):
        weights = rank_weights(old, communicator.rank, topology)

        def fail(_sends):
            raise OSError("disk on fire")

        wire = Meddling(communicator, fail) if communicator.rank == 1 else communicator
        try:
            migrate(wire, topology, old, new, weights, timeout=0.5)
        finally:
            assert_weights(weights, old, communicator.rank, topology)

    outcomes = run_threads(body, 2)
    assert all(isinstance(outcome, TransferError) for outcome in outcomes), outcomes


def test_weights_that_are_not_where_the_plan_thinks_are_found_before_they_spread():
    topology = EpTopology(2, 1, 2)
    first, second, third = np.array([[0, 1, 2, 3]]), np.array([[2, 1, 0, 3]]), np.array([[0, 1, 2, 3]])

    def body(communicator):
        weights = rank_weights(first, communicator.rank, topology)
        updater = ExpertLocationUpdater(communicator, topology, weights)
        migrate_layer(updater, plan_transfer(first, second, topology).layers[0])
        stale = plan_transfer(np.array([[1, 2, 0, 3]]), third, topology).layers[0]
        with pytest.raises(VerificationError, match="the plan starts from"):
            migrate_layer(updater, stale)
        assert_weights(weights, second, communicator.rank, topology)

    results_of(body, 2)


def test_a_cycle_inside_a_rank_needs_one_spare_slot():
    topology = EpTopology(1, 1, 6)
    old, new = [[0, 1, 2, 3, 4, 5]], [[1, 2, 3, 4, 5, 0]]
    program = rank_program(plan_transfer(old, new, topology).layers[0].batches[0], 0, topology)
    assert program.num_staging_slots == 1
    assert len(program.copies) == 7


@pytest.mark.parametrize(
    ("weights", "options", "words"),
    [
        ([[torch.zeros(3, 4)]], {}, "must have slots_per_rank=2 rows"),
        ([[]], {}, "holds no tensor"),
        ([[torch.zeros(2, 4, 3).transpose(1, 2)]], {}, "must have contiguous rows"),
        ([[torch.zeros(2, 400, 3)]], {"staging_bytes": 100}, "does not hold one expert"),
    ],
)
def test_unusable_weights_are_refused(weights, options, words):
    communicator = InMemoryHub(1).communicator(0)
    with pytest.raises(ConfigError, match=words):
        ExpertLocationUpdater(communicator, EpTopology(1, 1, 2), weights, **options)


def test_the_oracle_tells_experts_apart():
    rows = [expert_row(layer, expert, *WEIGHT_SPECS[0]) for layer in range(2) for expert in range(4)]
    assert len({row.numpy().tobytes() for row in rows}) == 8
