"""Host time of planning a whole rebalance: ours for all ranks at once, SGLang's on one rank for itself.

SGLang plans inside its update, layer by layer, on every rank, on the way of the forward pass; ours plans once, on one
rank, beside it. What SGLang spends is measured by its own function with small tensors and with the library call that
would send them replaced by one that does nothing; what is left is planning and building its operations. Ours is given
both ways: the plan with its digest, and with one rank's programs and messages for all layers built as well.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import neighbours
from equipoise.distributed.communicator import PeerTensor, Pending
from equipoise.topology import EpTopology
from equipoise.transfer.execution.updater import ExpertLocationUpdater
from equipoise.transfer.planning.plan import plan_transfer


class _Nothing:
    def wait(self, timeout: float) -> None:
        del timeout


class _SendsNothing:
    """A communicator that builds the operations and drops them."""

    knows_streams = False

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size

    def post(self, sends: list[PeerTensor], recvs: list[PeerTensor]) -> Pending:
        for peer, tensor in recvs:
            dist.P2POp(dist.irecv, tensor, group_peer=peer, group=dist.group.WORLD)
        for peer, tensor in sends:
            dist.P2POp(dist.isend, tensor, group_peer=peer, group=dist.group.WORLD)
        return _Nothing()

    def all_reduce_sum_(self, tensor: torch.Tensor, timeout: float = 0.0) -> None:
        del timeout
        tensor.zero_()


def random_maps(num_layers: int, num_experts: int, topology: EpTopology, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    redundant = topology.num_slots - num_experts
    maps = [
        np.stack(
            [
                rng.permutation(np.concatenate([np.arange(num_experts), rng.integers(0, num_experts, redundant)]))
                for _ in range(num_layers)
            ]
        )
        for _ in range(2)
    ]
    return maps[0], maps[1]


def measure(cache: Path | None, rank: int = 3, repeats: int = 7) -> dict[str, Any]:
    """Medians in seconds for 58 layers of 256 experts on 32 ranks in 4 nodes, and ours on 512 ranks.

    Args:
        cache: where SGLang's package is; None leaves SGLang out.
    """
    topology, num_layers, num_experts = EpTopology(32, 4, 9), 58, 256
    old, new = random_maps(num_layers, num_experts, topology, 0)
    dist.init_process_group("fake", rank=rank, world_size=topology.num_ranks, store=FakeStore())
    weights = [[torch.zeros(9, 4096), torch.zeros(9, 4096)] for _ in range(num_layers)]  # rows that travel unpacked
    module = None if cache is None else neighbours.load_sglang(cache)
    buffers = None if module is None else module.create_temp_buffers(weights[0])
    rows = list(zip(old.tolist(), new.tolist(), strict=True))

    def sglang() -> None:
        assert module is not None
        real, torch.distributed.batch_isend_irecv = torch.distributed.batch_isend_irecv, lambda _ops: []
        for (before, after), tensors in zip(rows, weights, strict=True):
            module.update_expert_weights_single_layer(
                routed_experts_weights=tensors,
                temp_buffers=buffers,
                old_physical_to_logical_map=before,
                new_physical_to_logical_map=after,
                num_local_physical_experts=topology.slots_per_rank,
                num_gpu_per_node=topology.ranks_per_node,
                rank=rank,
                world_size=topology.num_ranks,
            )
        torch.distributed.batch_isend_irecv = real

    communicator = _SendsNothing(rank, topology.num_ranks)
    updater = ExpertLocationUpdater(  # room for a layer in one batch, as SGLang has it
        communicator,
        topology,
        weights,
        verification="off",
        staging_bytes=1 << 20,  # type: ignore[arg-type]
    )

    def plan() -> None:
        _ = plan_transfer(old, new, topology, num_logical_experts=num_experts).digest

    def plan_and_build() -> None:
        whole = plan_transfer(old, new, topology, num_logical_experts=num_experts)
        _ = whole.digest
        for layer in whole.layers:
            updater.stage(layer.layer_id, layer.batches[0])

    many = EpTopology(512, 64, 1)
    many_maps = random_maps(num_layers, num_experts, many, 1)

    def plan_512() -> None:
        _ = plan_transfer(*many_maps, many, num_logical_experts=num_experts).digest

    times: dict[str, list[float]] = {}
    for _ in range(repeats + 1):  # the first one compiles
        for each in (*((sglang,) if module else ()), plan, plan_and_build, plan_512):
            start = time.perf_counter()
            each()
            times.setdefault(each.__name__, []).append(time.perf_counter() - start)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    result = {
        "layers": num_layers,
        "experts": num_experts,
        "ranks": topology.num_ranks,
        "equipoise_plan_seconds": medians["plan"],
        "equipoise_plan_and_build_seconds": medians["plan_and_build"],
        "equipoise_plan_512_ranks_seconds": medians["plan_512"],
    }
    if module is not None:
        result["sglang_plan_and_build_seconds"] = medians["sglang"]
        result["plan_ratio"] = medians["plan"] / medians["sglang"]
        result["plan_and_build_ratio"] = medians["plan_and_build"] / medians["sglang"]
    return result


def summary(planning: dict[str, Any]) -> str:
    """What :func:`measure` found, as a sentence."""
    ms = {name: 1e3 * value for name, value in planning.items() if name.endswith("_seconds")}
    parts = [
        f"planning {planning['layers']} layers of {planning['experts']} experts on {planning['ranks']} ranks: "
        f"{ms['equipoise_plan_seconds']:.1f} ms for all ranks, "
        f"{ms['equipoise_plan_and_build_seconds']:.1f} ms with one rank's operations built",
        f"on 512 ranks: {ms['equipoise_plan_512_ranks_seconds']:.0f} ms",
    ]
    if "plan_ratio" in planning:
        parts.insert(
            1,
            f"SGLang plans and builds them in {ms['sglang_plan_and_build_seconds']:.1f} ms on every rank "
            f"(ratios {planning['plan_ratio']:.2f} and {planning['plan_and_build_ratio']:.2f})",
        )
    return "; ".join(parts)
