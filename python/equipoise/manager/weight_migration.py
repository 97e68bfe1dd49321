"""WeightMigration: moves weights with our updater; the maps follow, layer by layer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count, islice

import numpy as np

from equipoise.config import EplbConfig
from equipoise.distributed.communicator import Communicator
from equipoise.errors import ConfigError, TransferCancelled, TransferError, VerificationError
from equipoise.manager.failures import FailureWatch
from equipoise.manager.live_placement import LivePlacement
from equipoise.manager.migration import MigrationBroken
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.transfer.execution.profile import LayerProfile, experts_over_ranks
from equipoise.transfer.execution.runner import InlineRunner, TransferRunner, TransferState
from equipoise.transfer.execution.updater import CommittedBatch, ExpertLocationUpdater
from equipoise.transfer.execution.vote import VOTE_GRACE_SECONDS
from equipoise.transfer.execution.worker import TransferWorker
from equipoise.transfer.memory.store import ExpertWeights
from equipoise.transfer.planning.types import TransferBatch, TransferPlan

_IDLE_WAIT_SECONDS = 0.001
"""Pause between two looks at a transfer when no forward pass runs."""

_STALL_SLACK_SECONDS = 30.0
"""Beyond all timeouts of a batch, before the watchdog says that its thread hangs."""

_LOADED_ANEW = "the host has loaded weights anew: what is staged is stale"


def weight_migration(
    config: EplbConfig,
    expert_weights: ExpertWeights,
    placement: LivePlacement,
    communicator: Communicator,
    transfer_communicator: Communicator | None,
    failures: FailureWatch,
) -> WeightMigration:
    """A migration as the options want it; arguments are those of :class:`~equipoise.manager.manager.EplbManager`.

    Raises:
        ConfigError: mode ``async`` without a communicator of its own; weights or budgets that cannot be used.
    """
    overlapped = config.eplb_transfer_mode == "async"
    if overlapped and transfer_communicator is None:
        raise ConfigError(
            "eplb_transfer_mode 'async' needs a transfer_communicator, with groups that nobody else uses",
            field="eplb_transfer_mode",
        )
    updater = ExpertLocationUpdater(
        transfer_communicator if transfer_communicator is not None else communicator,
        placement.metadata.topology,
        expert_weights,
        verification=config.eplb_verification,
        staging_bytes=config.eplb_staging_bytes,
        timeout=config.eplb_transfer_timeout,
        duty=config.eplb_transfer_duty if overlapped else 1.0,
    )
    stall_timeout = config.eplb_transfer_timeout + VOTE_GRACE_SECONDS + _STALL_SLACK_SECONDS
    runner = TransferWorker(updater, stall_timeout=stall_timeout) if overlapped else InlineRunner(updater)
    max_commits = None if config.eplb_transfer_mode == "sync" else config.eplb_rebalance_layers_per_chunk
    return WeightMigration(placement, communicator, updater, runner, failures, max_commits=max_commits)


class WeightMigration:
    """Commits what our transfer brings, layer by layer; the maps follow the weights.

    Args:
        placement: the live one.
        communicator: of the serving thread.
        updater: what the runner stages with.
        runner: brings the weights.
        failures: told of what a callback of the host raises; the runner's polls tell the other ranks.
        max_commits: commits of one :meth:`advance`, transfers included where they are not overlapped; None: all.
    """

    def __init__(
        self,
        placement: LivePlacement,
        communicator: Communicator,
        updater: ExpertLocationUpdater,
        runner: TransferRunner,
        failures: FailureWatch,
        *,
        max_commits: int | None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.max_staged_experts: int | None = updater.max_staged_experts
        self.layers_pending = 0
        self._committed: list[CommittedBatch] = []
        self._placement = placement
        self._communicator = communicator
        self._updater = updater
        self._runner = runner
        self._failures = failures
        self._max_commits = max_commits
        self._sleep = sleep
        self._target: ExpertLocationMetadata | None = None
        self._experts: np.ndarray | None = None  # sent and received by all ranks in the batch that committed last
        self._bytes = self._no_bytes()
        self._weights_changed = False
        self._staying: list[int] = []  # layers whose experts stay and whose dispatch weights have yet to change
        self._cancelled: str | None = None

    def begin(self, target: ExpertLocationMetadata, plan: TransferPlan | None) -> None:
        """See :class:`Migration`. Nothing commits yet: another rank may have failed to begin."""
        moving = {layer.layer_id for layer in plan.layers} if plan is not None else set()
        self._target, self._bytes, self._committed = target, self._no_bytes(), []
        self._staying = [row for row in range(target.num_layers) if row not in moving]
        self._cancelled = None
        self.layers_pending = len(moving)
        if plan is not None and plan.layers:
            self._runner.start(plan)

    def advance(self, *, idle: bool) -> bool:
        """See :class:`Migration`. Layers whose experts stay need no transfer: they commit in the first call."""
        try:
            self._commit_staying()
            self._commit_ready(idle)
        except TransferError:
            self.layers_pending = 0
            raise
        finally:
            if self._weights_changed and not self._runner.active:
                self.weights_changed()
        return not self._runner.active

    def cancel(self, reason: str) -> None:
        self._cancelled = reason
        self._runner.cancel(reason)

    def end_tick(self) -> None:
        self._runner.proceed()

    def weights_changed(self) -> None:
        self._weights_changed = self._runner.active
        if self._weights_changed:  # the thread may be reading canaries: they are forgotten once it has ended
            self._runner.cancel(_LOADED_ANEW)
        else:
            self._updater.forget_canaries(list(range(self._placement.metadata.num_layers)))

    def bytes_over_ranks(self) -> np.ndarray:
        return self._bytes

    @property
    def profiles(self) -> list[LayerProfile]:
        measured = [each.profile for each in self._committed]
        return [replace(each, layer_id=self._placement.layer_ids[each.layer_id]) for each in measured]

    @property
    def peak_staging_bytes(self) -> int:
        return max((profile.peak_staging_bytes for profile in self.profiles), default=0)

    def warm_up(self) -> None:
        self._updater.warm_up()

    def close(self) -> None:
        self._runner.close()

    def _commit_staying(self) -> None:
        rows, self._staying = self._staying, []
        if not rows:
            return
        if self._cancelled is None:
            assert self._target is not None
            with self._failures.guard("committing dispatch weights"):
                self._placement.commit(self._target, rows)
        elif not self._runner.active:  # else it says so itself, once its thread has stopped
            raise TransferCancelled(self._cancelled)

    def _commit_ready(self, idle: bool) -> None:
        for _ in islice(count(), self._max_commits):
            if not self._runner.active:
                return
            try:
                state = self._runner.poll(self._communicator, failed=self._failures.failed)
            except TransferError as error:
                raise MigrationBroken(f"the ranks cannot agree any more: {error}") from error
            if state == TransferState.FAILED:
                raise MigrationBroken(self._failures.reasons())
            if state == TransferState.BROKEN:
                raise MigrationBroken(self._runner.error or "the transfer of another rank is broken")
            if state != TransferState.READY:
                if idle:
                    self._sleep(_IDLE_WAIT_SECONDS)
                return
            try:
                self._add(self._runner.commit(self._commit_batch))
            except TransferError as error:
                if self._runner.error is not None:
                    raise MigrationBroken(f"{self._runner.error} (after: {error})") from error
                if self._weights_changed and isinstance(error, VerificationError):
                    raise TransferCancelled(_LOADED_ANEW) from error  # written while a rank was sending them
                raise
            except Exception as error:  # the other ranks have committed: this one's weights may be half written
                self._failures.note("a commit; weights of this rank may be half written, restart it", error)

    def _add(self, committed: CommittedBatch) -> None:
        assert self._experts is not None
        self._bytes += committed.staged.profile.expert_bytes * self._experts
        self._committed.append(committed)

    def _no_bytes(self) -> np.ndarray:
        return np.zeros((self._placement.metadata.topology.num_ranks, 4), dtype=np.int64)

    def _commit_batch(self, row: int, batch: TransferBatch) -> None:
        """The weights of a layer have just changed on all ranks: its maps follow before anything else runs."""
        assert self._target is not None
        self._experts = experts_over_ranks(batch, self._placement.metadata.topology)
        with self._failures.guard("committing a layer's maps"):
            if np.array_equal(batch.new_map, self._target.physical_to_logical_map[row].numpy()):
                self.layers_pending -= 1
                self._placement.commit(self._target, [row])
            else:  # on the way there: a complete placement too, but not one that weights were solved for
                self._placement.commit_map(row, batch.new_map.copy())
