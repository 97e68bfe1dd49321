"""`equipoise explain-transfer OLD NEW`: what a change of placement moves, for people.

Reads two placement files (JSON or ``.pt`` with ``physical_to_logical_map``), plans the way from one to the other, and
prints a line per layer, or every transfer of one layer.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from equipoise.cli.tables import print_paragraphs, print_table
from equipoise.errors import ConfigError, InvalidInputError, PlacementError
from equipoise.formats.readers.placements import read_placement
from equipoise.topology import EpTopology
from equipoise.transfer.planning.plan import plan_transfer
from equipoise.transfer.planning.types import LayerTransferPlan, SlotCase, TransferBatch, TransferPlan


@dataclass(frozen=True)
class LayerSummary:
    """One layer of a plan in numbers."""

    layer_id: int
    cases: dict[SlotCase, int]  # slots by the way they get their expert, over all batches
    crossings: int  # experts that cross to another node
    relayed: int  # transfers from a rank that received the expert in the same batch
    busiest_sender: int  # experts that it sends
    busiest_receiver: int
    num_rounds: int
    num_batches: int


def summarise_layer(layer: LayerTransferPlan, topology: EpTopology) -> LayerSummary:
    """Counts over all batches of a layer."""
    cases: Counter[SlotCase] = Counter()
    sent: Counter[int] = Counter()
    received: Counter[int] = Counter()
    crossings = relayed = 0
    for batch in layer.batches:
        cases.update(batch.slot_cases(topology))
        for transfer in batch.transfers:
            sent[topology.rank_of_slot(transfer.source_slot)] += 1
            received[topology.rank_of_slot(transfer.destination_slot)] += 1
            crossings += topology.node_of_slot(transfer.source_slot) != topology.node_of_slot(transfer.destination_slot)
            relayed += transfer.relayed
    return LayerSummary(
        layer.layer_id,
        {case: cases[case] for case in SlotCase},
        crossings,
        relayed,
        max(sent.values(), default=0),
        max(received.values(), default=0),
        layer.num_rounds,
        len(layer.batches),
    )


def plan_table(plan: TransferPlan) -> Table:
    """A line per layer that changes."""
    table = Table(title=f"transfer plan {plan.digest[:12]}", title_justify="left")
    for name in (
        "layer", "copy", "free rider", "same node", "other node", "crossings", "relayed", "busiest sender",
        "busiest receiver", "rounds", "batches",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for layer in plan.layers:
        row = summarise_layer(layer, plan.topology)
        moved = [row.cases[case] for case in SlotCase if case is not SlotCase.UNCHANGED]
        numbers = [row.layer_id, *moved, row.crossings, row.relayed, row.busiest_sender, row.busiest_receiver]
        table.add_row(*map(str, [*numbers, row.num_rounds, row.num_batches]))
    return table


def layer_table(layer: LayerTransferPlan, topology: EpTopology) -> Table:
    """Every transfer of a layer, in the order in which it happens."""
    table = Table(title=f"layer {layer.layer_id}", title_justify="left")
    for name in ("batch", "round", "expert", "from", "to", "way"):
        table.add_column(name, justify="right")
    for index, batch in enumerate(layer.batches):
        for transfer in batch.transfers:
            table.add_row(
                str(index),
                str(transfer.round),
                str(transfer.expert),
                _place(transfer.source_slot, topology),
                _place(transfer.destination_slot, topology),
                _way(transfer.source_slot, transfer.destination_slot, bool(transfer.relayed), topology),
            )
        _add_local_rows(table, index, batch, topology)
    return table


def explain_transfer(
    old_path: str | os.PathLike[str],
    new_path: str | os.PathLike[str],
    console: Console,
    *,
    num_ranks: int | None = None,
    num_nodes: int | None = None,
    max_staged_experts: int | None = None,
    layer_id: int | None = None,
) -> int:
    """Prints the plan from one placement file to another.

    Args:
        old_path: JSON or ``.pt`` file with ``physical_to_logical_map`` of shape (L, P).
        new_path: likewise, of the same shape.
        console: where to print.
        num_ranks: ranks over which the P slots are spread; from OLD if it says so, which our own files do.
        num_nodes: nodes that the ranks form; likewise, else 1.
        max_staged_experts: as for :func:`~equipoise.transfer.planning.plan.plan_transfer`.
        layer_id: print every transfer of this layer instead of a line per layer.

    Returns:
        The exit code, 0.

    Raises:
        PlacementError: a file cannot be read, or the placements do not fit together.
        ConfigError: slots that do not divide over the ranks, or a layer that does not exist.
    """
    (old, known), (new, _) = placement_file(old_path, "OLD"), placement_file(new_path, "NEW")
    if old.shape != new.shape:
        raise PlacementError(f"OLD has shape {old.shape}, NEW has {new.shape}", field="NEW")
    num_ranks = num_ranks if num_ranks is not None else known.num_ranks if known else None
    num_nodes = num_nodes if num_nodes is not None else known.num_nodes if known else 1
    if num_ranks is None:
        raise ConfigError(
            "OLD does not say over how many ranks its slots are spread: num_ranks must", field="num_ranks"
        )
    if num_ranks < 1 or old.shape[1] % num_ranks:
        raise ConfigError(f"num_ranks={num_ranks} must divide the {old.shape[1]} slots of a layer", field="num_ranks")
    topology = EpTopology(num_ranks, num_nodes, old.shape[1] // num_ranks)
    if layer_id is not None and not 0 <= layer_id < old.shape[0]:
        raise ConfigError(f"layer_id must be in [0, {old.shape[0]}), got {layer_id}", field="layer_id")
    plan = plan_transfer(old, new, topology, max_staged_experts=max_staged_experts)
    chosen = [layer for layer in plan.layers if layer_id is None or layer.layer_id == layer_id]
    if not chosen:
        console.print("nothing moves" if layer_id is None else f"nothing moves in layer {layer_id}")
        return 0
    print_table(plan_table(plan) if layer_id is None else layer_table(chosen[0], topology), console)
    total = [summarise_layer(layer, topology) for layer in chosen]
    print_paragraphs(
        f"{sum(layer.num_transfers for layer in chosen)} experts sent in {len(chosen)} of {plan.num_layers} layers, "
        f"{sum(row.crossings for row in total)} of them to another node; "
        f"rounds: {sum(row.num_rounds for row in total)}, batches: {sum(row.num_batches for row in total)}",
        console,
    )
    return 0


def placement_file(path: str | os.PathLike[str], name: str) -> tuple[np.ndarray, EpTopology | None]:
    """(L, P) int64 from a placement file, with its topology if it is one of our own.

    Raises:
        PlacementError: it cannot be read, or holds load instead of a map; the message names the file.
    """
    try:
        start = read_placement(path)
    except InvalidInputError as error:
        raise PlacementError(f"{name}: {error}", field=name) from None
    return start.physical_to_logical_map, start.topology


def _place(slot: int, topology: EpTopology) -> str:
    rank = topology.rank_of_slot(slot)
    return f"slot {slot} (rank {rank}, node {topology.node_of_rank(rank)})"


def _way(source: int, destination: int, relayed: bool, topology: EpTopology) -> str:
    crosses = topology.node_of_slot(source) != topology.node_of_slot(destination)
    return "other node" if crosses else "relayed" if relayed else "same node"


def _add_local_rows(table: Table, index: int, batch: TransferBatch, topology: EpTopology) -> None:
    for slot, case in enumerate(batch.slot_cases(topology)):
        if case in (SlotCase.COPY, SlotCase.FREE_RIDER):
            table.add_row(str(index), "commit", str(batch.new_map[slot]), "", _place(slot, topology), case.value)
