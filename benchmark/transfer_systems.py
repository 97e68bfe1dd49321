"""The movers under comparison, behind one interface, on one rank each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

import neighbours
from equipoise.config import Verification
from equipoise.distributed.communicator import PeerTensor, Pending, TorchCommunicator
from equipoise.placement.alignment import slot_order
from equipoise.topology import EpTopology
from equipoise.transfer.execution.updater import ExpertLocationUpdater
from equipoise.transfer.memory.pool import ExpertPool
from equipoise.transfer.planning.plan import plan_transfer
from helpers.placements import pooled

Weights = list[list[torch.Tensor]]


@dataclass(frozen=True)
class Message:
    """A tensor that this rank posts."""

    batch: int  # messages of one batch are under way together
    sent: bool
    peer: int
    num_bytes: int


class Mover(Protocol):
    """One system on one rank."""

    name: str
    weights: Weights | ExpertPool

    def migrate(self, new: np.ndarray) -> np.ndarray:
        """Moves all layers to ``new``, (L, P); planning is part of it. Returns the map that holds afterwards."""
        ...

    def staging_bytes(self) -> int:
        """Peak bytes that the mover held beside the live weights."""
        ...

    def record(self, into: list[Message] | None) -> Callable[[], None]:
        """Starts to list what is posted; the returned function ends it."""
        ...


class EquipoiseMover:
    """Ours: align (optionally), plan, then stage, verify, vote and commit, step by step.

    ``aligned`` is the way the manager uses it: the new placement's slots are permuted within ranks, and its ranks
    relabelled, for the fewest moves. Without, it moves to exactly the map that the others move to. ``shared_rows``: the
    experts of all layers lie in one pool, as in the embedded engine, instead of in tensors of each layer.
    """

    def __init__(
        self,
        topology: EpTopology,
        weights: Weights,
        old: np.ndarray,
        *,
        verification: Verification,
        aligned: bool,
        shared_rows: bool,
        staged_experts: int,
        rounds_in_flight: int,
    ) -> None:
        kind = f"{'aligned' if aligned else 'exact map'}{', shared rows' if shared_rows else ''}"
        self.name = f"equipoise, {kind}, {verification}, {staged_experts} staged"
        self._topology = topology
        self._aligned = aligned
        self._now = old
        self._communicator = TorchCommunicator(dist.group.WORLD)
        largest = max(sum(tensor[0].nbytes for tensor in tensors) for tensors in weights)
        # Room for small rows, canary and checksum beside the experts' own bytes.
        budget = staged_experts * (largest + 4096) + 65536
        self.weights = pooled(weights, staged_experts) if shared_rows else weights
        self._updater = ExpertLocationUpdater(
            self._communicator,
            topology,
            self.weights,
            verification=verification,
            staging_bytes=budget,
            rounds_in_flight=rounds_in_flight,
        )

    def migrate(self, new: np.ndarray) -> np.ndarray:
        if self._aligned:
            order = slot_order(self._now, new, self._topology, relabel="ranks")
            new = np.take_along_axis(new, order, axis=1)
        plan = plan_transfer(self._now, new, self._topology, max_staged_experts=self._updater.max_staged_experts)
        for layer in plan.layers:
            for batch in layer.batches:
                self._updater.commit(self._updater.stage(layer.layer_id, batch))
        self._now = new
        return new

    def staging_bytes(self) -> int:
        return self._updater.staging_bytes

    def record(self, into: list[Message] | None) -> Callable[[], None]:
        if into is None:
            return lambda: None
        original, batch = self._communicator.post, [0]

        def listening(sends: Sequence[PeerTensor], recvs: Sequence[PeerTensor]) -> Pending:
            into.extend(Message(batch[0], True, peer, tensor.nbytes) for peer, tensor in sends)
            into.extend(Message(batch[0], False, peer, tensor.nbytes) for peer, tensor in recvs)
            batch[0] += 1
            return original(sends, recvs)

        self._communicator.post = listening  # type: ignore[method-assign]

        def stop() -> None:
            self._communicator.post = original  # type: ignore[method-assign]

        return stop


class SglangMover:
    """SGLang's update_expert_weights_single_layer, layer by layer as its updater calls it."""

    name = "sglang 0.5.23"

    def __init__(self, topology: EpTopology, weights: Weights, old: np.ndarray, cache: Path) -> None:
        self._module = neighbours.load_sglang(cache)
        self._topology, self.weights, self._now = topology, weights, old
        self._buffers: list[torch.Tensor] = []

    def migrate(self, new: np.ndarray) -> np.ndarray:
        topology = self._topology
        self._buffers = self._module.create_temp_buffers(self.weights[0])
        for layer, tensors in enumerate(self.weights):
            self._module.update_expert_weights_single_layer(
                routed_experts_weights=tensors,
                temp_buffers=self._buffers,
                old_physical_to_logical_map=self._now[layer].tolist(),
                new_physical_to_logical_map=new[layer].tolist(),
                num_local_physical_experts=topology.slots_per_rank,
                num_gpu_per_node=topology.ranks_per_node,
                rank=dist.get_rank(),
                world_size=topology.num_ranks,
            )
        self._now = new
        return new

    def staging_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers)

    def record(self, into: list[Message] | None) -> Callable[[], None]:
        return _record_batches(torch.distributed, into)


class VllmMover:
    """vLLM's move_to_buffer and move_from_buffer, layer by layer as rearrange_expert_weights_inplace calls them."""

    def __init__(self, topology: EpTopology, weights: Weights, old: np.ndarray, cache: Path, *, batching: bool) -> None:
        self.name = "vllm 0.32.0 (migration batching)" if batching else "vllm 0.32.0"
        self._module, self._communicators = neighbours.load_vllm(cache)
        self._topology, self.weights, self._now = topology, weights, old
        self._batching = batching
        self._buffers = [torch.empty_like(tensor) for tensor in weights[0]]  # vLLM allocates them once, at start-up
        self._communicator = self._communicators.TorchDistNcclEplbCommunicator(dist.group.WORLD)

    def migrate(self, new: np.ndarray) -> np.ndarray:
        size, rank = self._topology.slots_per_rank, dist.get_rank()
        for layer, tensors in enumerate(self.weights):
            metadata = self._module.move_to_buffer(
                num_local_experts=size,
                old_indices=self._now[layer],
                new_indices=new[layer],
                expert_weights=tensors,
                expert_weights_buffers=self._buffers,
                stream=None,
                ep_rank=rank,
                communicator=self._communicator,
                layer_idx=layer,
                enable_migration_batching=self._batching,
            )
            self._module.move_from_buffer(
                expert_weights=tensors,
                expert_weights_buffers=self._buffers,
                transfer_metadata=metadata,
                new_indices=new[layer],
                ep_rank=rank,
            )
        self._now = new
        return new

    def staging_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers)

    def record(self, into: list[Message] | None) -> Callable[[], None]:
        return _record_batches(self._communicators, into)


def _record_batches(module: Any, into: list[Message] | None) -> Callable[[], None]:
    """Listens in on ``module.batch_isend_irecv``, for an untimed run."""
    if into is None:
        return lambda: None
    original, batch = module.batch_isend_irecv, [0]

    def listening(ops: Sequence[dist.P2POp]) -> list[dist.Work]:
        for op in ops:
            peer = op.group_peer if op.group_peer is not None else op.peer
            into.append(Message(batch[0], op.op is dist.isend, peer, op.tensor.nbytes))
        batch[0] += 1
        return original(ops)

    module.batch_isend_irecv = listening

    def stop() -> None:
        module.batch_isend_irecv = original

    return stop
