"""A placement on its way, with a runner that plays what the background would do: one rank, real plans and maps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from equipoise import EpTopology, ExpertLocationMetadata, plan_transfer
from equipoise.config import TransferMode
from equipoise.distributed.in_memory import InMemoryHub
from equipoise.errors import TransferCancelled, TransferError, VerificationError
from equipoise.manager.failures import FailureWatch
from equipoise.manager.live_placement import LivePlacement
from equipoise.manager.migration import MigrationBroken
from equipoise.manager.weight_migration import WeightMigration
from equipoise.transfer.execution.profile import LayerProfile
from equipoise.transfer.execution.runner import TransferState
from equipoise.transfer.execution.stream import CommitTimer
from equipoise.transfer.execution.updater import CommittedBatch, StagedBatch
from equipoise.transfer.planning.plan import TransferBatch, TransferPlan

TOPOLOGY = EpTopology(2, 2, 5)
LAYERS, EXPERTS = 4, 8


class Runner:
    """Has ``staged`` batches ready; then works, or breaks."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, TransferBatch]] = []
        self.staged = 100
        self.error: str | None = None
        self.fails_at: int | None = None  # batch of the plan that the ranks vote against
        self.voted: TransferError = TransferError("voted down")
        self.committed = 0
        self.cancelled: str | None = None

    @property
    def active(self) -> bool:
        return bool(self.batches)

    def start(self, plan: TransferPlan) -> None:
        self.batches = [(layer.layer_id, batch) for layer in plan.layers for batch in layer.batches]

    def poll(self, _communicator: object, *, failed: bool) -> TransferState:
        if failed:
            return TransferState.FAILED
        if self.error is not None:
            return TransferState.BROKEN
        return TransferState.READY if self.staged > 0 else TransferState.WORKING

    def commit(self, on_commit: Callable[[int, TransferBatch], None]) -> CommittedBatch:
        if self.committed == self.fails_at:
            self.batches = []
            raise self.voted
        if self.cancelled is not None:
            self.batches = []
            raise TransferCancelled(self.cancelled)
        layer_id, batch = self.batches.pop(0)
        on_commit(layer_id, batch)
        self.staged -= 1
        self.committed += 1
        profile = LayerProfile(
            layer_id=layer_id,
            num_rounds=1,
            transfer_seconds=0.5,
            verify_seconds=0.25,
            commit_seconds=None,
            peak_staging_bytes=100 + layer_id,
            bytes_received=7,
            expert_bytes=10 + layer_id,
        )
        timer = CommitTimer(iter([3.0, 3.125]).__next__)
        timer.stop()
        return CommittedBatch(StagedBatch(layer_id, batch, None, profile), timer)  # type: ignore[arg-type]

    def proceed(self) -> None:
        pass

    def cancel(self, reason: str) -> None:
        self.cancelled = reason

    def close(self) -> None:
        self.batches = []


class Updater:
    """Notes whose canaries are forgotten."""

    max_staged_experts = 4

    def __init__(self) -> None:
        self.forgotten: list[list[int]] = []

    def forget_canaries(self, layer_ids: list[int]) -> None:
        self.forgotten.append(layer_ids)


class MigrationSetup:
    """Towards a placement in which layer 2 holds what it held, under other dispatch weights."""

    def __init__(self, mode: TransferMode = "async", per_chunk: int = 1, staged_experts: int | None = None) -> None:
        self.live = ExpertLocationMetadata.trivial(LAYERS, EXPERTS, TOPOLOGY, max_replicas=3)
        maps = self.live.physical_to_logical_map.numpy().copy()
        for layer in (0, 1, 3):
            maps[layer] = np.roll(maps[layer], 3)
        weights = np.ones((LAYERS, TOPOLOGY.num_slots), dtype=np.float32)
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                where = np.flatnonzero(maps[layer] == expert)
                weights[layer, where] = [1.0] if len(where) == 1 else [0.25, 0.75]
        self.target = ExpertLocationMetadata.from_physical_to_logical(
            maps, EXPERTS, TOPOLOGY, dispatch_weights=weights, max_replicas=3
        )
        self.plan = plan_transfer(self.live, self.target, TOPOLOGY, max_staged_experts=staged_experts)
        self.runner, self.slept = Runner(), []
        self.refreshed: list[int] = []
        placement = LivePlacement(self.live, on_layers_committed=lambda change: self.refreshed.extend(change.rows))
        communicator = InMemoryHub(1).communicator(0)
        self.updater = Updater()
        self.migration = WeightMigration(
            placement, communicator, self.updater, self.runner, FailureWatch(communicator),  # type: ignore[arg-type]
            max_commits=None if mode == "sync" else per_chunk, sleep=self.slept.append,
        )  # fmt: skip

    def arrived(self, layer: int) -> bool:
        return torch.equal(
            self.live.physical_to_logical_map[layer], self.target.physical_to_logical_map[layer]
        ) and torch.equal(self.live.dispatch_weights[layer], self.target.dispatch_weights[layer])

    def begin(self) -> None:
        self.migration.begin(self.target, self.plan)


def test_layers_whose_experts_stay_take_their_weights_once_all_ranks_have_begun() -> None:
    """Which is known a tick later: where ranks must choose alike, none may commit while another failed to begin."""
    setup = MigrationSetup()
    setup.begin()
    assert not any(setup.arrived(layer) for layer in range(LAYERS))
    setup.runner.staged = 0
    assert setup.migration.advance(idle=False) is False
    assert [setup.arrived(layer) for layer in range(LAYERS)] == [False, False, True, False]
    assert setup.refreshed == [2]
    assert setup.migration.layers_pending == 3


def test_a_change_of_weights_alone_needs_no_transfer() -> None:
    setup = MigrationSetup()
    maps = setup.live.physical_to_logical_map.numpy()
    weights = np.where(np.arange(TOPOLOGY.num_slots) < EXPERTS, 0.25, 0.75).astype(np.float32)[None].repeat(LAYERS, 0)
    weights[:, [expert for expert in range(EXPERTS) if (maps[0] == expert).sum() == 1]] = 1.0
    setup.target = ExpertLocationMetadata.from_physical_to_logical(
        maps, EXPERTS, TOPOLOGY, dispatch_weights=weights, max_replicas=3
    )
    setup.migration.begin(setup.target, None)
    setup.migration.cancel("the host says so")
    with pytest.raises(TransferCancelled, match="the host says so"):
        setup.migration.advance(idle=False)
    assert not any(setup.arrived(layer) for layer in range(LAYERS))
    setup.migration.begin(setup.target, None)
    assert setup.migration.advance(idle=False) is True
    assert all(setup.arrived(layer) for layer in range(LAYERS))
    assert (setup.migration.layers_pending, setup.runner.committed) == (0, 0)


@pytest.mark.parametrize(
    ("mode", "per_chunk", "commits"),
    [("sync", 1, [3]), ("chunked", 1, [1, 2, 3]), ("chunked", 2, [2, 3]), ("async", 1, [1, 2, 3]), ("async", 9, [3])],
)
def test_a_call_commits_as_many_steps_as_its_mode_allows(
    mode: TransferMode, per_chunk: int, commits: list[int]
) -> None:
    setup = MigrationSetup(mode, per_chunk)
    setup.begin()
    for count in commits:
        assert setup.migration.advance(idle=False) is (count == 3)
        assert setup.runner.committed == count
        assert setup.migration.layers_pending == 3 - count
    assert all(setup.arrived(layer) for layer in range(LAYERS))
    assert setup.refreshed == [2, 0, 1, 3]
    setup.live.check_integrity()


def test_what_is_not_staged_is_not_waited_for_beside_forward_passes() -> None:
    setup = MigrationSetup(per_chunk=9)
    setup.begin()
    setup.runner.staged = 1
    assert setup.migration.advance(idle=False) is False
    assert (setup.runner.committed, setup.slept) == (1, [])
    assert setup.migration.advance(idle=True) is False
    assert len(setup.slept) == 1, "without forward passes a look at the transfer must not spin"
    setup.runner.staged = 9
    assert setup.migration.advance(idle=False) is True


def test_a_layer_in_several_batches_counts_once_and_is_whole_in_between() -> None:
    setup = MigrationSetup("chunked", staged_experts=1)
    setup.begin()
    batches = len(setup.plan.layers[0].batches)
    assert batches > 1
    for number in range(1, batches + 1):
        setup.migration.advance(idle=False)
        setup.live.check_integrity()
        assert setup.migration.layers_pending == (2 if number == batches else 3)
        assert setup.arrived(0) is (number == batches)
    assert setup.refreshed == [2] + [0] * batches


def test_bytes_and_staging_of_all_commits_add_up() -> None:
    setup = MigrationSetup("sync")
    setup.begin()
    setup.migration.advance(idle=False)
    expected = np.zeros((2, 4), dtype=np.int64)  # each rank is a node: all that is sent crosses
    for layer in setup.plan.layers:
        for transfer in layer.batches[0].transfers:
            expected[TOPOLOGY.rank_of_slot(transfer.source_slot), [0, 2]] += 10 + layer.layer_id
            expected[TOPOLOGY.rank_of_slot(transfer.destination_slot), [1, 3]] += 10 + layer.layer_id
    assert expected.sum() > 0
    assert setup.migration.bytes_over_ranks().tolist() == expected.tolist()
    assert setup.migration.peak_staging_bytes == 103
    profiles = [(p.layer_id, p.transfer_seconds, p.verify_seconds, p.commit_seconds) for p in setup.migration.profiles]
    assert profiles == [(layer, 0.5, 0.25, 0.125) for layer in (0, 1, 3)]
    assert [p.bytes_received for p in setup.migration.profiles] == [7, 7, 7], "by rank 0"
    setup.migration.begin(setup.live, None)  # the next one begins at nothing
    assert setup.migration.bytes_over_ranks().tolist() == [[0, 0, 0, 0]] * 2
    assert (setup.migration.peak_staging_bytes, setup.migration.profiles) == (0, [])


def test_a_step_that_is_voted_down_leaves_the_rest_as_it_was() -> None:
    setup = MigrationSetup("sync")
    setup.runner.fails_at = 1
    setup.begin()
    with pytest.raises(TransferError, match="voted down") as caught:
        setup.migration.advance(idle=False)
    assert not isinstance(caught.value, MigrationBroken)
    assert [setup.arrived(layer) for layer in range(LAYERS)] == [True, False, True, False]
    assert setup.migration.layers_pending == 0, "nothing is under way any more"


def test_a_broken_runner_is_said_with_its_reason() -> None:
    setup = MigrationSetup()
    setup.begin()
    setup.runner.error = "the transfer thread has died"
    with pytest.raises(MigrationBroken, match="the transfer thread has died"):
        setup.migration.advance(idle=False)
    assert setup.migration.layers_pending == 0


def test_a_vote_that_leaves_the_runner_broken_says_both() -> None:
    setup = MigrationSetup()
    setup.runner.fails_at = 0
    setup.begin()

    def broken_by_then(on_commit: object) -> CommittedBatch:
        del on_commit
        setup.runner.error = "no group of ranks is left"
        raise TransferError("voted down")

    setup.runner.commit = broken_by_then  # type: ignore[method-assign]
    with pytest.raises(MigrationBroken, match=r"no group of ranks is left \(after: voted down\)"):
        setup.migration.advance(idle=False)


def test_ranks_that_cannot_agree_any_more_end_it_for_good() -> None:
    setup = MigrationSetup()
    setup.begin()

    def lost(_communicator: object, **_: object) -> TransferState:
        raise TransferError("rank 3 has failed or left")

    setup.runner.poll = lost  # type: ignore[method-assign]
    with pytest.raises(MigrationBroken, match="cannot agree any more: rank 3 has failed or left"):
        setup.migration.advance(idle=False)
    assert setup.migration.layers_pending == 0


def test_nothing_commits_any_more_once_it_is_cancelled() -> None:
    setup = MigrationSetup()
    setup.begin()
    setup.migration.advance(idle=False)
    setup.migration.cancel("the host says so")
    with pytest.raises(TransferCancelled, match="the host says so"):
        setup.migration.advance(idle=False)
    assert [setup.arrived(layer) for layer in range(LAYERS)] == [True, False, True, False]
    assert setup.migration.layers_pending == 0


def test_weights_loaded_anew_drop_what_is_staged_and_then_the_canaries() -> None:
    setup = MigrationSetup()
    setup.migration.weights_changed()
    assert setup.updater.forgotten == [list(range(LAYERS))], "nothing is under way: at once"
    setup.begin()
    setup.migration.weights_changed()
    assert len(setup.updater.forgotten) == 1, "a thread may be reading them"
    with pytest.raises(TransferCancelled, match="loaded weights anew"):
        setup.migration.advance(idle=False)
    assert setup.runner.committed == 0
    assert len(setup.updater.forgotten) == 2


def test_weights_written_while_a_rank_sends_them_are_no_failure_of_the_transfer() -> None:
    """Its check finds them damaged. Where nothing was loaded, though something else has cancelled, they are."""
    setup = MigrationSetup()
    setup.runner.fails_at, setup.runner.voted = 0, VerificationError("expert 4 is damaged")
    setup.begin()
    setup.migration.weights_changed()
    with pytest.raises(TransferCancelled, match="loaded weights anew"):
        setup.migration.advance(idle=False)
    setup.begin()
    setup.migration.cancel("paused")
    with pytest.raises(VerificationError, match="damaged"):
        setup.migration.advance(idle=False)
