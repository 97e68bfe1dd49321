"""Tells what one committed batch cost a rank, and what it moved between all of them.

No rank counts what it sends: a batch that all ranks voted for moved what its plan says, between all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from equipoise.topology import EpTopology
from equipoise.transfer.planning.types import TransferBatch


@dataclass(frozen=True)
class LayerProfile:
    """One commit of one layer on one rank; a layer has several where a staging budget splits it."""

    layer_id: int
    transfer_seconds: float
    verify_seconds: float  # checks and the vote of all ranks
    commit_seconds: float | None  # of the weights' device; None: it has not come to the commit yet
    bytes_received: int  # by this rank: weights and what travels with them
    num_rounds: int  # in which this rank took part
    expert_bytes: int  # that travel for one expert
    peak_staging_bytes: int


def experts_over_ranks(batch: TransferBatch, topology: EpTopology) -> np.ndarray:
    """Counts experts that each rank sends, receives, sends to and receives from other nodes: (G, 4) int64."""
    source, destination = batch.transfer_table[:, 2:4].T // topology.slots_per_rank
    crosses = source // topology.ranks_per_node != destination // topology.ranks_per_node
    columns = (source, destination, source[crosses], destination[crosses])
    return np.stack([np.bincount(ranks, minlength=topology.num_ranks) for ranks in columns], axis=1)
