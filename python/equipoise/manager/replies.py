"""What the manager answers with: replies built from its state, and the dump file."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from einops import reduce

from equipoise.errors import ConfigError
from equipoise.load.recorder import LoadSnapshot
from equipoise.load.trace import LoadTrace
from equipoise.manager.commands import (
    DumpReply,
    ExpertLocationReply,
    Outcome,
    Rebalance,
    RebalanceProfile,
    RebalanceReport,
)
from equipoise.manager.planning import PlannedRebalance, as_optional_floats
from equipoise.placement.balancedness import balancedness, mean_balancedness
from equipoise.placement.metadata import ExpertLocationMetadata, PlacementDiff


def rebalance_report(
    metadata: ExpertLocationMetadata,
    planned: PlannedRebalance | None,
    *,
    request: Rebalance | None,
    algorithm: str,
    forward_pass_id: int,
    profile: RebalanceProfile,
    per_rank_bytes: np.ndarray,
    error: str | None,
) -> RebalanceReport:
    """The report of a rebalance that ended.

    Args:
        planned: None if planning itself failed.
        algorithm: the one that was to plan.
        per_rank_bytes: (G, 4) int64 as :meth:`~equipoise.manager.migration.Migration.bytes_over_ranks` gives it.
        error: why it failed; None if it did not.
    """
    layers, num_nodes = metadata.num_layers, metadata.topology.num_nodes
    skipped = planned is None or planned.decision.action == "skip"
    nothing = np.zeros(layers, dtype=np.int64)
    diff = planned.diff if planned and planned.diff else PlacementDiff(nothing, nothing, nothing)
    outcome: Outcome = "committed"
    if error is not None:
        outcome = "failed"
    elif skipped:
        outcome = "skipped"
    elif request is not None and request.dry_run:
        outcome = "dry_run"
    unknown: list[float | None] = [None] * layers
    before = planned.balancedness_before if planned else unknown
    after = planned.balancedness_after if planned else unknown
    sent, received, node_sent, node_received = per_rank_bytes.T
    per_node = "(node rank) -> node"
    return RebalanceReport(
        outcome=outcome,
        action=planned.decision.action if planned else "skip",
        reason=planned.decision.reason if planned else "planning failed",
        algorithm=algorithm,
        forward_pass_id=forward_pass_id,
        window_steps=planned.window_steps if planned else 0,
        balancedness_before=before,
        balancedness_after=after,
        mean_balancedness_before=mean_or_none(before),
        mean_balancedness_after=mean_or_none(after),
        slots_changed=diff.slots_changed.tolist(),
        moves=diff.moves.tolist(),
        cross_node_moves=diff.cross_node_moves.tolist(),
        bytes_sent_per_rank=sent.tolist(),
        bytes_received_per_rank=received.tolist(),
        bytes_sent_per_node=reduce(node_sent, per_node, "sum", node=num_nodes).tolist(),
        bytes_received_per_node=reduce(node_received, per_node, "sum", node=num_nodes).tolist(),
        planning_seconds=planned.seconds if planned else 0.0,
        transfer_seconds=profile.migrate_seconds,
        stall_seconds=profile.stall_seconds,
        profile=profile,
        error=error,
    )


def window_balancedness(window: torch.Tensor, metadata: ExpertLocationMetadata) -> list[float | None]:
    """Per layer, of a (W, L, E) window on the present placement; None for layers that saw no token, or W = 0."""
    if not len(window):
        return [None] * metadata.num_layers
    return as_optional_floats(balancedness(window.sum(0), metadata).numpy())


def mean_or_none(values: list[float | None]) -> float | None:
    """Average over the layers that have a value."""
    return mean_balancedness([np.nan if value is None else value for value in values])


def expert_location_reply(metadata: ExpertLocationMetadata) -> ExpertLocationReply:
    topology = metadata.topology
    return ExpertLocationReply(
        num_ranks=topology.num_ranks,
        num_nodes=topology.num_nodes,
        slots_per_rank=topology.slots_per_rank,
        num_logical_experts=metadata.num_logical_experts,
        physical_to_logical_map=metadata.physical_to_logical_map.tolist(),
        dispatch_weights=metadata.dispatch_weights.tolist(),
    )


def write_dump(
    snapshot: LoadSnapshot, metadata: ExpertLocationMetadata, directory: str, wall_clock: float
) -> DumpReply:
    """Writes a snapshot as a LoadTrace, whole or not at all.

    Raises:
        ConfigError: the directory is missing or cannot be written.
    """
    first, last = snapshot.forward_pass_ids[0], snapshot.forward_pass_ids[-1]
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(wall_clock)) + f"{wall_clock % 1:.3f}"[1:].replace(".", "")
    path = Path(directory).resolve() / f"expert_distribution_{stamp}_{first}-{last}.npz"
    topology = metadata.topology
    trace = LoadTrace(
        logical_count=snapshot.logical_count.numpy(),
        forward_pass_ids=np.array(snapshot.forward_pass_ids),
        physical_count=None if snapshot.physical_count is None else snapshot.physical_count.numpy(),
        physical_to_logical_map=metadata.physical_to_logical_map.cpu().numpy(),
        metadata={
            "source": "equipoise",
            "num_ranks": topology.num_ranks,
            "num_nodes": topology.num_nodes,
            "slots_per_rank": topology.slots_per_rank,
        },
    )
    try:
        trace.save(path)
    except OSError as error:
        raise ConfigError(f"cannot write a dump into dump_dir {directory!r}: {error}", field="dump_dir") from None
    tokens = int(snapshot.logical_count.sum((0, 2)).max())
    return DumpReply(path=str(path), num_steps=len(snapshot.forward_pass_ids), num_tokens=tokens)
