"""Carries a plan out on one rank without a host: every batch staged and committed in turn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from equipoise.topology import EpTopology
from equipoise.transfer.execution.profile import LayerProfile, experts_over_ranks
from equipoise.transfer.execution.updater import ExpertLocationUpdater
from equipoise.transfer.planning.types import LayerTransferPlan, TransferBatch


def migrate_layer(
    updater: ExpertLocationUpdater,
    layer: LayerTransferPlan,
    on_commit: Callable[[TransferBatch], None] = lambda _: None,
) -> list[LayerProfile]:
    """Collective. One profile a batch; ``on_commit`` is called after each."""
    profiles = []
    for batch in layer.batches:
        profiles.append(updater.commit(updater.stage(layer.layer_id, batch)).profile)
        on_commit(batch)
    return profiles


def bytes_over_ranks(layer: LayerTransferPlan, profiles: list[LayerProfile], topology: EpTopology) -> np.ndarray:
    """(G, 4) int64: what each rank sent, received, sent to and received from other nodes."""
    pairs = zip(layer.batches, profiles, strict=True)
    return sum(profile.expert_bytes * experts_over_ranks(batch, topology) for batch, profile in pairs)  # type: ignore[return-value]
