"""A placement on its way: commits what the transfer brings, layer by layer, and lets the maps follow the weights."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from equipoise.config import TransferMode
from equipoise.dispatch.dispatcher import ExpertDispatcher
from equipoise.distributed.communicator import Communicator
from equipoise.errors import TransferError
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.transfer.execution.profile import LayerProfile, experts_over_ranks
from equipoise.transfer.execution.runner import TransferRunner, TransferState
from equipoise.transfer.planning.types import TransferBatch, TransferPlan

_IDLE_WAIT_SECONDS = 0.001
"""Pause between two looks at a transfer when no forward pass runs."""


class MigrationBroken(TransferError):
    """The ranks can no longer move anything; the last committed placement serves on."""


class Migration:
    """Moves the live placement to a target, a few commits per call of :meth:`advance`.

    Args:
        metadata: the live placement.
        dispatcher: told of each layer that changes.
        communicator: of the serving thread.
        runner: brings the weights.
        mode: ``sync`` commits everything in one call; ``chunked`` ``layers_per_chunk`` batches, transfers included;
            ``async`` at most as many of those that the background has staged.
    """

    def __init__(
        self,
        metadata: ExpertLocationMetadata,
        dispatcher: ExpertDispatcher,
        communicator: Communicator,
        runner: TransferRunner,
        *,
        mode: TransferMode,
        layers_per_chunk: int,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._metadata = metadata
        self._dispatcher = dispatcher
        self._communicator = communicator
        self._runner = runner
        self._limit = None if mode == "sync" else layers_per_chunk
        self._sleep = sleep
        self._target: ExpertLocationMetadata | None = None
        self._experts: np.ndarray | None = None  # sent and received by all ranks in the batch that committed last
        self._bytes = self._no_bytes()
        self.layers_pending = 0
        self.profiles: list[LayerProfile] = []

    def begin(self, target: ExpertLocationMetadata, plan: TransferPlan | None) -> None:
        """Starts towards ``target``.

        Layers whose experts stay where they are need no transfer: their new dispatch weights hold from now on.

        Args:
            plan: from the live placement to the target; None if no expert moves.
        """
        moving = {layer.layer_id for layer in plan.layers} if plan is not None else set()
        self._commit_target(target, [layer for layer in range(target.num_layers) if layer not in moving])
        self._target, self._bytes, self.profiles = target, self._no_bytes(), []
        self.layers_pending = len(moving)
        if plan is not None and plan.layers:
            self._runner.start(plan)

    def advance(self, *, idle: bool) -> bool:
        """Collective. Commits what is ready; True once the target is reached.

        Raises:
            TransferError: the ranks voted against a batch. Layers committed before stand, this and later ones are as
                they were.
            MigrationBroken: nothing will move any more.
        """
        commits = 0
        while self._runner.active and (self._limit is None or commits < self._limit):
            try:
                state = self._runner.poll(self._communicator)
            except TransferError as error:
                self.layers_pending = 0
                raise MigrationBroken(f"the ranks cannot agree any more: {error}") from error
            if state == TransferState.BROKEN:
                self.layers_pending = 0
                raise MigrationBroken(self._runner.error or "the transfer of another rank is broken")
            if state != TransferState.READY:
                if idle:
                    self._sleep(_IDLE_WAIT_SECONDS)
                break
            try:
                profile = self._runner.commit(self._commit_batch)
            except TransferError as error:
                self.layers_pending = 0
                if self._runner.error is not None:
                    raise MigrationBroken(f"{self._runner.error} (after: {error})") from error
                raise
            assert self._experts is not None
            self.profiles.append(profile)
            self._bytes += profile.expert_bytes * self._experts
            commits += 1
        return not self._runner.active

    def bytes_over_ranks(self) -> np.ndarray:
        """(G, 4) int64: what each rank sent, received, sent to and received from other nodes for committed layers."""
        return self._bytes

    @property
    def peak_staging_bytes(self) -> int:
        """Of this rank."""
        return max((profile.peak_staging_bytes for profile in self.profiles), default=0)

    def _no_bytes(self) -> np.ndarray:
        return np.zeros((self._metadata.topology.num_ranks, 4), dtype=np.int64)

    def _commit_batch(self, layer_id: int, batch: TransferBatch) -> None:
        """The weights of a layer have just changed on all ranks: its maps follow before anything else runs."""
        assert self._target is not None
        self._experts = experts_over_ranks(batch, self._metadata.topology)
        if np.array_equal(batch.new_map, self._target.physical_to_logical_map[layer_id].numpy()):
            self._commit_target(self._target, [layer_id])
            self.layers_pending -= 1
        else:  # on the way there: a complete placement too, but not one that weights were solved for
            self._metadata.update_layer_(layer_id, batch.new_map.copy())
            self._dispatcher.refresh([layer_id])

    def _commit_target(self, target: ExpertLocationMetadata, layers: list[int]) -> None:
        self._metadata.update_layers_(target, layers)
        self._dispatcher.refresh(layers)
