"""What a layer's migration cost one rank, and what it moved between all of them."""

from __future__ import annotations

from dataclasses import dataclass

import einops
import numpy as np

from equipoise.topology import EpTopology
from equipoise.transfer_plan import TransferStep


@dataclass(frozen=True, eq=False)
class LayerTransferReport:
    """Bytes over the wire, weights and what travels with them, and where the time went."""

    layer_id: int
    rank: int
    topology: EpTopology
    sent_to_rank: np.ndarray  # (G,) int64, bytes
    received_from_rank: np.ndarray  # (G,) int64, bytes
    num_rounds: int  # in which this rank took part
    num_steps: int
    transfer_seconds: float
    verify_seconds: float  # checks and vote
    commit_seconds: float
    peak_staging_bytes: int
    bytes_over_ranks: np.ndarray  # (G, 4) int64: each rank sent, received, sent to and received from other nodes

    @property
    def seconds(self) -> float:
        return self.transfer_seconds + self.verify_seconds + self.commit_seconds

    @property
    def bytes_sent(self) -> int:
        return int(self.sent_to_rank.sum())

    @property
    def bytes_received(self) -> int:
        return int(self.received_from_rank.sum())

    @property
    def sent_to_node(self) -> np.ndarray:
        """(N,) int64 bytes, the own node included."""
        return _per_node(self.sent_to_rank, self.topology)

    @property
    def received_from_node(self) -> np.ndarray:
        """(N,) int64 bytes, the own node included."""
        return _per_node(self.received_from_rank, self.topology)

    @property
    def bytes_sent_to_other_nodes(self) -> int:
        return self.bytes_sent - int(self.sent_to_node[self.topology.node_of_rank(self.rank)])

    @property
    def bytes_received_from_other_nodes(self) -> int:
        return self.bytes_received - int(self.received_from_node[self.topology.node_of_rank(self.rank)])

    def __add__(self, later: LayerTransferReport) -> LayerTransferReport:
        """Both together: steps of one layer, or layers of one migration (which keep the first layer's id)."""
        return LayerTransferReport(
            self.layer_id,
            self.rank,
            self.topology,
            self.sent_to_rank + later.sent_to_rank,
            self.received_from_rank + later.received_from_rank,
            self.num_rounds + later.num_rounds,
            self.num_steps + later.num_steps,
            self.transfer_seconds + later.transfer_seconds,
            self.verify_seconds + later.verify_seconds,
            self.commit_seconds + later.commit_seconds,
            max(self.peak_staging_bytes, later.peak_staging_bytes),
            self.bytes_over_ranks + later.bytes_over_ranks,
        )


def experts_over_ranks(step: TransferStep, topology: EpTopology) -> np.ndarray:
    """Experts that each rank sends, receives, sends to and receives from other nodes in a step: (G, 4) int64."""
    source, destination = step.transfer_table[:, 2:4].T // topology.slots_per_rank
    crosses = source // topology.ranks_per_node != destination // topology.ranks_per_node
    columns = (source, destination, source[crosses], destination[crosses])
    return np.stack([np.bincount(ranks, minlength=topology.num_ranks) for ranks in columns], axis=1)


def _per_node(per_rank: np.ndarray, topology: EpTopology) -> np.ndarray:
    return einops.reduce(per_rank, "(node rank) -> node", "sum", node=topology.num_nodes)
