"""What a layer's migration cost one rank, and what it moved between all of them.

No rank counts what it sends: a batch that all ranks voted for moved what its plan says, between all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from equipoise.topology import EpTopology
from equipoise.transfer.planning.types import TransferBatch


@dataclass(frozen=True, eq=False)
class LayerTransferReport:
    """Bytes over the wire, weights and what travels with them, and where the time went."""

    layer_id: int
    rank: int
    num_rounds: int  # in which this rank took part
    transfer_seconds: float
    verify_seconds: float  # checks and vote
    commit_seconds: float
    peak_staging_bytes: int
    bytes_over_ranks: np.ndarray  # (G, 4) int64: each rank sent, received, sent to and received from other nodes

    @property
    def bytes_received(self) -> int:
        """By this rank."""
        return int(self.bytes_over_ranks[self.rank, 1])

    def __add__(self, later: LayerTransferReport) -> LayerTransferReport:
        """Both together: batches of one layer, or layers of one migration (which keep the first layer's id)."""
        return LayerTransferReport(
            self.layer_id,
            self.rank,
            self.num_rounds + later.num_rounds,
            self.transfer_seconds + later.transfer_seconds,
            self.verify_seconds + later.verify_seconds,
            self.commit_seconds + later.commit_seconds,
            max(self.peak_staging_bytes, later.peak_staging_bytes),
            self.bytes_over_ranks + later.bytes_over_ranks,
        )


def experts_over_ranks(batch: TransferBatch, topology: EpTopology) -> np.ndarray:
    """Experts that each rank sends, receives, sends to and receives from other nodes in a batch: (G, 4) int64."""
    source, destination = batch.transfer_table[:, 2:4].T // topology.slots_per_rank
    crosses = source // topology.ranks_per_node != destination // topology.ranks_per_node
    columns = (source, destination, source[crosses], destination[crosses])
    return np.stack([np.bincount(ranks, minlength=topology.num_ranks) for ranks in columns], axis=1)
