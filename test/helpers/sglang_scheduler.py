"""A scheduler of SGLang without a model, on ranks that are threads: what the balancer is driven by in the tests."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from equipoise.config import EplbConfig
from equipoise.distributed.in_memory import InMemoryCommunicator, InMemoryHub
from equipoise.hosts.sglang.balancer import SglangBalancer
from equipoise.hosts.sglang.live_maps import SglangMaps
from equipoise.manager.commands import Command
from equipoise.manager.host import HostTraits
from equipoise.manager.live_placement import LayersCommitted
from equipoise.manager.manager import EplbManager
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology
from helpers.run_threads import results_of

TOPOLOGY = EpTopology(2, 1, 6)
NUM_LAYERS, NUM_EXPERTS, NUM_SLOTS = 4, 8, 12  # of SGLang; its layer 0 is dense
LAYER_IDS = [1, 2, 3]


class Scheduler:
    """A scheduler of SGLang without a model: maps of all layers, weights that name the expert they belong to."""

    def __init__(self, communicator: InMemoryCommunicator, transfers: InMemoryHub, **options: Any) -> None:
        rank = self.rank = communicator.rank
        self.maps = live_maps()
        writer = SglangMaps(self.maps, rank=rank)
        self.weights = [[torch.empty(TOPOLOGY.slots_per_rank, 4)] for _ in LAYER_IDS]
        self.load_weights(added=0.5)
        self.reports: list[Any] = []
        changed: list[int] = []

        def follow(change: LayersCommitted) -> None:
            changed.extend(row for row in change.rows if row not in changed)
            writer.write(change.layer_ids, change.placement, change.rows)

        manager = EplbManager(
            EplbConfig(eplb_algorithm="equipoise", ep_num_redundant_experts=4, **options),
            self.weights,
            ExpertLocationMetadata.from_physical_to_logical(
                writer.physical_to_logical(LAYER_IDS), NUM_EXPERTS, TOPOLOGY, max_replicas=5
            ),
            communicator,
            transfer_communicator=transfers.communicator(rank),
            host=HostTraits(
                layer_ids=LAYER_IDS,
                dispatch="weights",
                replicated_counts=True,
                on_layers_committed=follow,
                on_report=self.reports.append,
            ),
        )
        self.balancer = SglangBalancer(manager, writer, changed)

    def forward(self) -> None:
        """A pass in which experts 6 and 7 of layer 2 get most tokens; every rank counts them all."""
        counts = torch.ones(NUM_LAYERS, NUM_SLOTS, dtype=torch.int32) * 10
        for expert in (6, 7):
            counts[2, self.maps.physical_to_logical_map[2] == expert] = 200
        self.balancer.count(counts)
        self.balancer.end_pass()
        self.balancer.turn()

    def load_weights(self, *, added: float) -> None:
        """As SGLang's loader: each slot gets what the maps say, another model's for another ``added``."""
        self.added = added
        slots = list(TOPOLOGY.slots_of_rank(self.rank))
        for row, layer in enumerate(LAYER_IDS):
            self.weights[row][0].copy_(self.maps.physical_to_logical_map_cpu[layer, slots, None].float() + added)

    def idle(self, *, turns: int = 1) -> None:
        for _ in range(turns):
            self.balancer.turn()

    def ask(self, command: Command[Any], *, carry_on: Callable[[], None] | None = None) -> Any:
        """The reply to a command, while ``carry_on`` (idle turns by default) goes on."""
        replies: list[object] = []
        self.balancer.submit(command, replies.append)
        for _ in range(100_000):
            if replies:
                assert len(replies) == 1
                return replies[0]
            (carry_on or self.idle)()
        raise AssertionError("no reply")

    def check_weights_follow_maps(self) -> None:
        for row, layer in enumerate(LAYER_IDS):
            held = self.maps.physical_to_logical_map[layer, list(TOPOLOGY.slots_of_rank(self.rank))]
            assert torch.equal(self.weights[row][0][:, 0], held.float() + self.added)
            for expert in range(NUM_EXPERTS):
                valid = int(self.maps.logical_to_all_physical_map_num_valid[layer, expert])
                slots = self.maps.logical_to_all_physical_map[layer, expert, :valid]
                assert (self.maps.physical_to_logical_map[layer, slots] == expert).all()


def live_maps() -> SimpleNamespace:
    p2l = torch.arange(NUM_SLOTS).repeat(NUM_LAYERS, 1) % NUM_EXPERTS
    table = torch.full((NUM_LAYERS, NUM_EXPERTS, NUM_SLOTS), -1)
    for slot in range(NUM_SLOTS):
        table[:, slot % NUM_EXPERTS, slot // NUM_EXPERTS] = slot
    return SimpleNamespace(
        physical_to_logical_map=p2l,
        physical_to_logical_map_cpu=p2l.clone(),
        logical_to_all_physical_map=table,
        logical_to_all_physical_map_cpu=table.clone(),
        logical_to_all_physical_map_num_valid=(table >= 0).sum(-1),
        logical_to_rank_dispatch_physical_map=None,
    )


def on_ranks(body: Callable[[Scheduler], Any], **options: Any) -> list[Any]:
    transfers = InMemoryHub(TOPOLOGY.num_ranks)

    def run(communicator: InMemoryCommunicator) -> Any:
        scheduler = Scheduler(communicator, transfers, **options)
        try:
            with torch.inference_mode():  # as SGLang's event loops are
                return body(scheduler)
        finally:
            scheduler.balancer.manager.close()

    return results_of(run, TOPOLOGY.num_ranks)
