"""Migrations: what takes the live placement to a planned one, a few commits per tick.

:class:`HostMigration` has the host's own mover do it; weight_migration.py moves weights with our updater. A host may
bring another one that does what :class:`Migration` says.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from equipoise.errors import TransferCancelled, TransferError
from equipoise.manager.failures import FailureWatch
from equipoise.manager.live_placement import LivePlacement
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.transfer.execution.profile import LayerProfile
from equipoise.transfer.planning.types import TransferPlan

MoveLayers = Callable[[ExpertLocationMetadata, list[int]], None]
"""(target, the host's layer numbers): collective and blocking; brings the weights and the host's maps of these layers
to the target, on all ranks, or raises."""


class MigrationBroken(TransferError):
    """The ranks can no longer move anything; the last committed placement serves on."""


class Migration(Protocol):
    """What the phase machine drives. Every rank has one and calls it alike."""

    layers_pending: int  # that have not committed yet
    max_staged_experts: int | None  # what a transfer plan must be made for; None: none is needed

    @property
    def profiles(self) -> list[LayerProfile]:
        """Of those commits, as far as the device has come."""
        ...

    @property
    def peak_staging_bytes(self) -> int: ...

    def begin(self, target: ExpertLocationMetadata, plan: TransferPlan | None) -> None:
        """Starts towards ``target``, and commits nothing yet.

        Args:
            plan: the way there; None if no expert moves or none is needed.
        """
        ...

    def advance(self, *, idle: bool) -> bool:
        """Collective. Commits what is ready; True once the target is reached. ``idle``: no forward pass is waiting.

        Raises:
            TransferError: on all ranks; layers committed before stand, the others are as they were.
            MigrationBroken: nothing will move any more.
        """
        ...

    def cancel(self, reason: str) -> None:
        """Collective. Nothing more commits: a later :meth:`advance` raises TransferCancelled."""
        ...

    def end_tick(self) -> None:
        """All messages of a tick have been sent: what runs in the background may go on."""
        ...

    def weights_changed(self) -> None:
        """Collective. The host wrote the live weights: what is staged is stale, what slots hold is believed anew."""
        ...

    def bytes_over_ranks(self) -> np.ndarray:
        """(G, 4) int64: what each rank sent, received, sent to and received from other nodes for committed layers."""
        ...

    def warm_up(self) -> None:
        """Collective, before serving: what is slow the first time."""
        ...

    def close(self) -> None:
        """Ends what runs in the background."""
        ...


class HostMigration:
    """Has the host's own mover do the work, some layers a tick.

    Args:
        move_layers: see :data:`MoveLayers`.
        failures: told of what the mover raises.
        layers_per_tick: layers of one call; None: all.
    """

    def __init__(
        self,
        placement: LivePlacement,
        move_layers: MoveLayers,
        failures: FailureWatch,
        *,
        layers_per_tick: int | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.max_staged_experts: int | None = None
        self.layers_pending = self.peak_staging_bytes = 0
        self.profiles: list[LayerProfile] = []
        self._placement = placement
        self._move_layers = move_layers
        self._failures = failures
        self._layers_per_tick = layers_per_tick
        self._clock = clock
        self._target: ExpertLocationMetadata | None = None
        self._pending: list[int] = []
        self._cancelled: str | None = None

    def begin(self, target: ExpertLocationMetadata, plan: TransferPlan | None) -> None:
        del plan  # none was made
        committed = self._placement.committed
        maps = (committed.physical_to_logical_map, target.physical_to_logical_map)
        weights = (committed.dispatch_weights, target.dispatch_weights)
        changed = (maps[0] != maps[1]).any(1) | (weights[0] != weights[1]).any(1)
        self._target, self._cancelled, self.profiles = target, None, []
        self._pending = changed.nonzero().flatten().tolist()
        self.layers_pending = len(self._pending)

    def advance(self, *, idle: bool) -> bool:
        del idle  # the mover is waited for
        assert self._target is not None
        if self._cancelled is not None:
            self._pending, self.layers_pending = [], 0
            raise TransferCancelled(self._cancelled)
        rows = self._pending[: self._layers_per_tick]
        if rows:
            ids = [self._placement.layer_ids[row] for row in rows]
            start = self._clock()
            try:
                self._move_layers(self._target, ids)
                self._placement.commit(self._target, rows)
            except Exception as error:  # on all ranks or on this one: the next tick ends it on all of them
                self._failures.note(f"the host's mover, with layers {ids}", error)
            seconds = (self._clock() - start) / len(rows)
            self.profiles += [LayerProfile(layer_id, seconds, 0.0, 0.0, 0, 0, 0, 0) for layer_id in ids]
            self._failures.mark()
        self._pending = self._pending[len(rows) :]
        self.layers_pending = len(self._pending)
        return not self._pending

    def cancel(self, reason: str) -> None:
        self._cancelled = reason

    def end_tick(self) -> None:
        """Nothing runs in the background."""

    def weights_changed(self) -> None:
        """Nothing is staged between two ticks."""

    def bytes_over_ranks(self) -> np.ndarray:
        """(G, 4) zeros: only the host knows."""
        return np.zeros((self._placement.metadata.topology.num_ranks, 4), dtype=np.int64)

    def warm_up(self) -> None:
        """The host's mover is the host's to warm up."""

    def close(self) -> None:
        """Nothing runs in the background."""
