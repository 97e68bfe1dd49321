"""Builds our manager and its balancer for a scheduler, from what SGLang's runtime holds once its weights are loaded."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from equipoise.config import EplbConfig, TransferTransport
from equipoise.dispatch.dispatcher import ExpertDispatcher
from equipoise.distributed.communicator import Communicator, TorchCommunicator
from equipoise.distributed.groups import new_transfer_group
from equipoise.distributed.pinned_host import PinnedHostCommunicator
from equipoise.hosts.sglang.algorithm import kind_of_dispatch
from equipoise.hosts.sglang.balancer import SglangBalancer
from equipoise.hosts.sglang.batch_dispatch import BatchDispatch
from equipoise.hosts.sglang.launch.settings import PluginSettings
from equipoise.hosts.sglang.live_maps import SglangMaps
from equipoise.hosts.sglang.metrics import RebalanceMetrics
from equipoise.hosts.sglang.stock_mover import stock_migration
from equipoise.manager.host import HostTraits
from equipoise.manager.live_placement import LayersCommitted
from equipoise.manager.manager import EplbManager
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology

log = logging.getLogger("equipoise.hosts.sglang")


@dataclass(frozen=True)
class SglangRuntime:
    """What the manager is built from.

    Attributes:
        moe: SGLang's options of the ``exec.moe`` namespace.
        live: SGLang's ``ExpertLocationMetadata``.
        weights: per MoE layer, by SGLang's number, the tensors of this rank's experts, each (slots_per_rank, ...).
        ranks: global ranks of the expert-parallel group.
        rank: of this process in it.
    """

    moe: Any
    live: Any
    weights: Mapping[int, list[torch.Tensor]]
    ranks: list[int]
    rank: int
    num_nodes: int
    num_groups: int | None
    device: torch.device

    @property
    def replicated(self) -> bool:
        """Every rank routes, and counts, the tokens of all ranks."""
        return bool(self.moe.moe_a2a_backend == "none")


def runtime_of(runner: Any) -> SglangRuntime:
    """Collects it from a ``ModelRunner`` whose weights are loaded."""
    from sglang.srt.eplb.expert_location import ModelConfigForExpertLocation, get_global_expert_location_metadata
    from sglang.srt.runtime_context import get_device, get_exec, get_parallel

    parallel = get_parallel()
    weights = runner.model.routed_experts_weights_of_layer
    shape = ModelConfigForExpertLocation.from_model_config(runner.model_config)
    return SglangRuntime(
        moe=get_exec().moe,
        live=get_global_expert_location_metadata(),
        weights=getattr(weights, "value", weights),
        ranks=list(parallel.moe_ep_group.ranks),
        rank=parallel.moe_ep_group.rank_in_group,
        num_nodes=parallel.nnodes,
        num_groups=shape.num_groups,
        device=torch.device(get_device().device),
    )


def eplb_config(moe: Any, num_redundant: int, own_options: Mapping[str, Any]) -> EplbConfig:
    """Our options from SGLang's flags and the plugin's file.

    Raises:
        ConfigError: a value that cannot be.
    """
    buffer_size = moe.expert_distribution_recorder_buffer_size
    return EplbConfig(
        enable_eplb=True,
        eplb_algorithm=moe.eplb_algorithm,
        eplb_rebalance_num_iterations=moe.eplb_rebalance_num_iterations,
        eplb_rebalance_layers_per_chunk=moe.eplb_rebalance_layers_per_chunk or 1,
        eplb_min_rebalancing_utilization_threshold=moe.eplb_min_rebalancing_utilization_threshold,
        ep_num_redundant_experts=num_redundant,
        expert_distribution_recorder_buffer_size=buffer_size if buffer_size and buffer_size > 0 else 1000,
        **{
            "ep_dispatch_algorithm": "static" if moe.ep_dispatch_algorithm == "static" else "dynamic",
            "ep_dispatch_scope": "all" if moe.moe_a2a_backend == "none" else "rank",
            **own_options,
        },
    )


def build_balancer(
    runtime: SglangRuntime, settings: PluginSettings, collaborators: Mapping[str, Any], metrics: RebalanceMetrics | None
) -> tuple[SglangBalancer, BatchDispatch | None]:
    """Collective. The balancer of this rank, warmed up, and what chooses replicas where it is not SGLang.

    Allocates staging: before SGLang measures memory for its cache.

    Args:
        collaborators: the keyword arguments of SGLang's ``EPLBManager``, for level ``manager``.
        metrics: of rank 0.

    Raises:
        ConfigError: options, weights or budgets that cannot be used.
    """
    live, layer_ids = runtime.live, sorted(runtime.weights)
    maps = SglangMaps(live, rank=runtime.rank)
    config = eplb_config(runtime.moe, live.num_physical_experts - live.num_logical_experts, settings.options)
    metadata = ExpertLocationMetadata.from_physical_to_logical(
        maps.physical_to_logical(layer_ids),
        live.num_logical_experts,
        EpTopology(live.ep_size, runtime.num_nodes, live.num_local_physical_experts),
        max_replicas=live.num_physical_experts - live.num_logical_experts + 1,
        device=runtime.device,
    )

    changed: list[int] = []

    def follow(change: LayersCommitted) -> None:
        changed.extend(row for row in change.rows if row not in changed)
        maps.write(change.layer_ids, change.placement, change.rows)
        if batch is not None:
            batch.refresh(change.rows)

    by_batch = config.ep_dispatch_algorithm == "batch"
    traits = HostTraits(
        layer_ids=layer_ids,
        dispatch="batch" if by_batch else kind_of_dispatch(runtime.moe.ep_dispatch_algorithm),
        replicated_counts=runtime.replicated,
        num_groups=runtime.num_groups,
        on_layers_committed=follow,
        on_report=None if metrics is None else metrics.ended,
    )
    gloo = partial(dist.new_group, runtime.ranks, backend="gloo")
    serving = TorchCommunicator(gloo(), "cpu", new_group=gloo, new_control_group=gloo)
    batch = _batch_dispatch(runtime, config, metadata, layer_ids, serving)
    if settings.level == "manager":
        layers = runtime.moe.eplb_rebalance_layers_per_chunk
        migration = stock_migration(collaborators, layer_ids, layers_per_tick=layers)
        manager = EplbManager(config, None, metadata, serving, host=traits, migration=migration)
    else:
        transfer = transfer_communicator(runtime, config.eplb_transport)
        weights = [list(runtime.weights[layer_id]) for layer_id in layer_ids]
        manager = EplbManager(config, weights, metadata, serving, transfer_communicator=transfer, host=traits)
    manager.warm_up()
    span = f"MoE layers {layer_ids[0]} to {layer_ids[-1]}"
    log.info("attached on rank %d, level %s, %s: %s", runtime.rank, settings.level, span, config)
    balancer = SglangBalancer(manager, maps, changed, on_phase=None if metrics is None else metrics.show_phase)
    return balancer, batch


def attached_on_all_ranks(attached: bool) -> bool:
    """Collective, whatever became of :func:`build_balancer` on this rank."""
    from sglang.srt.runtime_context import get_parallel

    flag = torch.tensor([int(attached)])
    dist.all_reduce(flag, dist.ReduceOp.MIN, group=get_parallel().moe_ep_group.cpu_group)
    return bool(flag)


def _batch_dispatch(
    runtime: SglangRuntime,
    config: EplbConfig,
    metadata: ExpertLocationMetadata,
    layer_ids: list[int],
    serving: Communicator,
) -> BatchDispatch | None:
    """Collective. What chooses replicas in SGLang's place; None: SGLang does."""
    if config.ep_dispatch_algorithm != "batch":
        return None
    batch = BatchDispatch(
        ExpertDispatcher.from_config(config, metadata, serving),
        layer_ids,
        rank=runtime.rank,
        num_ranks=len(runtime.ranks),
        replicated=runtime.replicated,
    )
    batch.warm_up(runtime.device)
    return batch


def transfer_communicator(runtime: SglangRuntime, transport: TransferTransport) -> Communicator:
    """Collective. Over groups of our own: transfers in a thread must never meet SGLang's collectives on its groups."""
    over_nccl = runtime.device.type == "cuda" and transport != "host"
    bulk = partial(new_transfer_group, "nccl" if over_nccl else "gloo", os.environ, ranks=runtime.ranks)
    control = partial(dist.new_group, runtime.ranks, backend="gloo")
    communicator = TorchCommunicator(
        bulk(),
        runtime.device if over_nccl else "cpu",
        control_group=control(),
        new_group=bulk,
        new_control_group=control,
    )
    if runtime.device.type == "cuda" and not over_nccl:
        return PinnedHostCommunicator(communicator, runtime.device)
    return communicator
