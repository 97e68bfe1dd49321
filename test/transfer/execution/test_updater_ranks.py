"""The updater on real ranks: gloo processes, hundreds of random placements, every slot's bytes against the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from equipoise.distributed.communicator import TorchCommunicator
from equipoise.errors import TransferError, TransferTimeout
from equipoise.topology import EpTopology
from equipoise.transfer.execution.updater import ExpertLocationUpdater
from equipoise.transfer.planning.plan import plan_transfer
from helpers.migrate import migrate_layer
from helpers.placements import (
    WEIGHT_SPECS,
    live_weights,
    perturbed,
    pooled,
    random_map,
    random_topology,
    rank_weights,
    same_bytes,
)
from helpers.run_ranks import RanksFailed, run_ranks

LARGE_ROWS = ((torch.float32, (70, 70)), (torch.uint8, (20_000,)), (torch.bfloat16, (9,)))


def walk_through_placements(rank: int, world_size: int, num_placements: int, seed: int) -> dict[str, int]:
    """Migrates from placement to placement; the weights of one are the start of the next."""
    communicator = TorchCommunicator(dist.group.WORLD)
    rng = np.random.default_rng(seed)
    done, transfers, in_batches, nodes = 0, 0, 0, set()
    while done < num_placements:
        topology = random_topology(rng, world_size)
        num_experts = int(rng.integers(1, topology.num_slots + 1))
        specs = LARGE_ROWS if rng.random() < 0.15 else WEIGHT_SPECS
        now = random_map(rng, num_experts, topology, num_layers=2)
        weights = rank_weights(now, rank, topology, specs)
        if rng.random() < 0.5:
            weights = pooled(weights, int(rng.integers(1, topology.slots_per_rank + 2)))
        updater = ExpertLocationUpdater(
            communicator,
            topology,
            weights,
            verification=str(rng.choice(["off", "canary", "checksum"])),
            rounds_in_flight=int(rng.integers(1, 4)),
            staging_bytes=1 << 24 if rng.random() < 0.3 else None,
            timeout=30.0,
        )
        budget = 1 if rng.random() < 0.5 else updater.max_staged_experts
        for _ in range(10):
            small = rng.random() < 0.5
            target = perturbed(rng, now, num_experts) if small else random_map(rng, num_experts, topology, 2)
            plan = plan_transfer(now, target, topology, num_logical_experts=num_experts, max_staged_experts=budget)
            updater.agree_on(plan)
            for layer in plan.layers:
                migrate_layer(updater, layer)
                in_batches += len(layer.batches) > 1
            expected = rank_weights(target, rank, topology, specs)
            for layer_id, tensors in enumerate(live_weights(weights)):
                for index, tensor in enumerate(tensors):
                    assert same_bytes(tensor, expected[layer_id][index]), (
                        f"{topology} layer {layer_id} tensor {index}: from {now[layer_id].tolist()} "
                        f"to {target[layer_id].tolist()}"
                    )
            now, done, transfers = target, done + 1, transfers + plan.num_transfers
            nodes.add(topology.num_nodes)
    return {"placements": done, "transfers": transfers, "layers_in_batches": in_batches, "node_counts": len(nodes)}


@pytest.mark.parametrize(("world_size", "num_placements"), [(2, 150), (4, 150), (8, 80)])
def test_hundreds_of_random_placements(world_size, num_placements):
    results = run_ranks(walk_through_placements, world_size, num_placements, 17 * world_size, timeout=150)
    assert all(result == results[0] for result in results)
    assert results[0]["placements"] >= num_placements
    assert results[0]["transfers"] > num_placements
    assert results[0]["layers_in_batches"] > 10, "under a budget of one expert"
    assert results[0]["node_counts"] > 1


def lose_a_message(rank: int, world_size: int) -> str:
    control = dist.new_group(backend="gloo")
    communicator = TorchCommunicator(
        dist.group.WORLD, control_group=control, new_group=lambda: dist.new_group(backend="gloo")
    )
    topology = EpTopology(world_size, 1, 2)
    old = np.arange(2 * world_size)[None, :]
    new = np.roll(old, 2, axis=1)
    weights = rank_weights(old, rank, topology)
    updater = ExpertLocationUpdater(communicator, topology, weights, timeout=4.0)
    layer = plan_transfer(old, new, topology).layers[0]
    post, lost = communicator.post, []

    def lossy(sends, recvs):
        if rank == 1 and not lost:
            lost.append(True)
            sends = []
        return post(sends, recvs)

    communicator.post = lossy
    with pytest.raises(TransferError) as caught:
        migrate_layer(updater, layer)
    for tensor, expected in zip(weights[0], rank_weights(old, rank, topology)[0], strict=False):
        assert same_bytes(tensor, expected)
    assert updater.error is None
    migrate_layer(updater, layer)
    for tensor, expected in zip(weights[0], rank_weights(new, rank, topology)[0], strict=False):
        assert same_bytes(tensor, expected)
    return type(caught.value).__name__


def test_after_a_lost_message_all_ranks_keep_the_old_layer_and_the_next_attempt_succeeds():
    kinds = run_ranks(lose_a_message, 4, timeout=60)
    assert kinds == [TransferTimeout.__name__] * 4


def fail_on_rank_one(rank: int, _world_size: int) -> None:
    if rank == 1:
        raise ValueError("only here")
    dist.barrier()


def test_run_ranks_raises_every_ranks_traceback():
    with pytest.raises(RanksFailed, match=r"rank 1 raised(.|\n)*only here"):
        run_ranks(fail_on_rank_one, 3, timeout=30)
