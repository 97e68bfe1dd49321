"""Host the core in your own engine: everything an engine must do for Equipoise, on 4 gloo ranks of one machine.

    python examples/host_the_core.py

The "engine" below has one weight matrix per expert and random, skewed routing in place of a router. What matters is
what the engine hands in, and three calls: route(), end_forward_pass() and tick().
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from equipoise import EpTopology, ExpertLocationMetadata
from equipoise.config import EplbConfig
from equipoise.distributed.communicator import TorchCommunicator
from equipoise.manager.commands import Rebalance
from equipoise.manager.manager import EplbManager

LAYERS, EXPERTS, REDUNDANT, HIDDEN = 4, 16, 4, 32


class MyEngine:
    """Holds the live expert weights of one rank."""

    def __init__(self, rank: int, topology: EpTopology, placement: ExpertLocationMetadata) -> None:
        experts = [torch.Generator().manual_seed(expert) for expert in range(EXPERTS)]
        every = torch.stack([torch.randn(HIDDEN, HIDDEN, generator=generator) for generator in experts])
        mine = placement.physical_to_logical_map[:, list(topology.slots_of_rank(rank))]
        self.weights = [[every[row].clone()] for row in mine]  # per layer: tensors of shape (slots_per_rank, ...)


def run(rank: int, world_size: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    topology = EpTopology.for_experts(EXPERTS, REDUNDANT, world_size, num_nodes=2)
    # max_replicas: room for any placement, so that the maps never need another allocation
    placement = ExpertLocationMetadata.trivial(LAYERS, EXPERTS, topology, max_replicas=REDUNDANT + 1)
    engine = MyEngine(rank, topology, placement)
    config = EplbConfig(ep_num_redundant_experts=REDUNDANT)
    # Experts travel in a background thread, which needs groups of its own.
    beside = TorchCommunicator(dist.new_group(), control_group=dist.new_group())
    manager = EplbManager(
        config, engine.weights, placement, TorchCommunicator(dist.group.WORLD), transfer_communicator=beside
    )

    pending, popularity = None, torch.arange(EXPERTS, 0, -1).float() ** 2
    for step in range(20_000):
        for layer in range(LAYERS):
            topk_ids = torch.multinomial(popularity.expand(64, -1), 2)  # your router's choice: (tokens, k)
            slots = manager.route(layer, topk_ids)  # where these tokens go; counted on the way
            assert torch.equal(placement.physical_to_logical_map[layer][slots], topk_ids)
        manager.end_forward_pass(counted=True, num_tokens=64)
        if step == 20:
            pending = manager.submit(Rebalance())  # an operator's wish; the same on every rank
        manager.tick()  # plans and moves a little, between two steps
        if pending is not None and pending.done:
            break
    if rank == 0:
        assert pending is not None
        report = pending.result()
        print(f"step {step}: {report.outcome}: {report.reason}")
        print(f"{report.bytes_moved:,} bytes moved; received per rank: {report.bytes_received_per_rank}")
    manager.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, args=(4, f"{folder}/rendezvous"), nprocs=4)
