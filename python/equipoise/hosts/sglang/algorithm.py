"""Level ``algorithm``: ``--eplb-algorithm equipoise`` plans SGLang's own rebalances from the placement in force.

Every rank plans, as SGLang has it; the ranks compare what they found before they move anything.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from equipoise.algorithms.problem import DispatchKind
from equipoise.algorithms.rebalance import rebalance_experts
from equipoise.algorithms.registry import find_algorithm
from equipoise.algorithms.warm_up import warm_up
from equipoise.hosts.sglang.hook_targets import Hook, HookTarget
from equipoise.hosts.sglang.launch.check import own_algorithms
from equipoise.hosts.sglang.share_table import even_table, share_table
from equipoise.jit.threads import available_cpus
from equipoise.jit.warming import WarmUp, warm_up_in_background
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology

log = logging.getLogger("equipoise.hosts.sglang")

Maps = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""(L, P) int64 physical to logical, (L, E, X) int64 logical to physical, (L, E) int64 replicas."""


@dataclass(frozen=True)
class OwnAlgorithm:
    """What SGLang hands from ``compute_algorithm`` to ``rebalance_experts`` in place of its enumeration's member."""

    name: str


def algorithm_hooks() -> list[Hook]:
    base = "eplb.eplb_algorithms."
    manager = "eplb.eplb_manager.EPLBManager."
    return [
        Hook(
            HookTarget(base + "compute_algorithm", ("raw_algorithm", "num_groups", "num_nodes")),
            "AROUND",
            compute_algorithm,
        ),
        Hook(
            HookTarget(
                base + "rebalance_experts",
                (
                    "tokens_per_expert",
                    "num_physical_experts",
                    "num_local_physical_experts",
                    "num_groups",
                    "num_nodes",
                    "algorithm",
                ),
            ),
            "AROUND",
            plan_or_original,
        ),
        Hook(
            HookTarget(manager + "_compute_expert_location_metadata", ("logical_count", "broadcast_over_world")),
            "AFTER",
            agree_on_plan,
        ),
        Hook(HookTarget("model_executor.model_runner.ModelRunner.initialize"), "AROUND", initialize_with_kernels),
    ]


def compute_algorithm(original: Callable[..., Any], raw_algorithm: str, *args: Any, **kwargs: Any) -> Any:
    if raw_algorithm in own_algorithms():
        return OwnAlgorithm(raw_algorithm)
    return original(raw_algorithm, *args, **kwargs)


def plan_or_original(original: Callable[..., Any], **kwargs: Any) -> Any:
    if not isinstance(kwargs["algorithm"], OwnAlgorithm):
        return original(**kwargs)
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata
    from sglang.srt.runtime_context import get_exec, get_parallel

    live = get_global_expert_location_metadata()  # None while the first placement is made from a file
    parallel = get_parallel()
    return plan_maps(
        kwargs["tokens_per_expert"].cpu().numpy(),
        EpTopology(
            kwargs["num_physical_experts"] // kwargs["num_local_physical_experts"],
            kwargs["num_nodes"],
            kwargs["num_local_physical_experts"],
        ),
        algorithm=kwargs["algorithm"].name,
        current=None if live is None else live.physical_to_logical_map_cpu.numpy(),
        num_groups=kwargs["num_groups"],
        oldest_step=_oldest_step(),
        counted_times=parallel.tp_size if get_exec().moe.moe_a2a_backend == "none" else 1,
        weighted=kind_of_dispatch(get_exec().moe.ep_dispatch_algorithm) == "weights",
        num_threads=max(1, available_cpus() // max(1, parallel.tp_size // parallel.nnodes)),
    )


def kind_of_dispatch(ep_dispatch_algorithm: str | None) -> DispatchKind:
    """How SGLang splits an expert's tokens: ``static`` takes the nearest replica, whatever share is planned for it."""
    return "weights" if ep_dispatch_algorithm in ("dynamic", "fake") else "even"


def plan_maps(
    steps: np.ndarray,
    topology: EpTopology,
    *,
    algorithm: str,
    current: np.ndarray | None,
    num_groups: int | None,
    oldest_step: int,
    counted_times: int,
    weighted: bool,
    num_threads: int,
) -> Maps:
    """One plan, as SGLang's ``rebalance_experts`` returns it. The same arguments give the same plan on every rank.

    Args:
        steps: (S, L, E) counts of single forward passes; a ring, with zero rows where nothing was recorded.
        current: (L, P) the placement in force; None before the first.
        oldest_step: where the ring begins.
        counted_times: ranks that counted each token: all of them without an a2a backend, one with it.
        weighted: whether dispatch follows the shares of the table's entries.
        num_threads: layers solved side by side.
    """
    start = time.perf_counter()
    num_experts = steps.shape[2]
    live = None if current is None else ExpertLocationMetadata.from_physical_to_logical(current, num_experts, topology)
    windows = windows_of_steps(np.roll(steps, -oldest_step, axis=0), find_algorithm(algorithm).history) // counted_times
    if not windows.any() and live is not None:
        planned = live
    else:
        load = windows if windows.any() else np.ones((1, *steps.shape[1:]), dtype=np.int64)
        planned = rebalance_experts(
            load,
            topology,
            algorithm=algorithm,
            current=live,
            num_groups=num_groups,
            dispatch="weights" if weighted else "even",
            num_threads=num_threads,
        )
    p2l = planned.physical_to_logical_map.numpy()
    tables = [
        share_table(row, shares, num_experts) if weighted else even_table(row, num_experts)
        for row, shares in zip(p2l, planned.dispatch_weights.numpy(), strict=True)
    ]
    moves = int(live.diff(planned).moves.sum()) if live is not None else p2l.size
    log.info(
        "planned by %s from %d windows in %.3f s: %d experts move",
        algorithm,
        len(windows),
        time.perf_counter() - start,
        moves,
    )
    width = max(table.shape[1] for table in tables)
    l2p = np.full((len(tables), num_experts, width), -1, dtype=np.int64)
    for layer, table in enumerate(tables):
        l2p[layer, :, : table.shape[1]] = table
    return torch.from_numpy(p2l.copy()), torch.from_numpy(l2p), planned.num_replicas.clone()


def windows_of_steps(steps: np.ndarray, num_windows: int) -> np.ndarray:
    """(S, L, E) counts of single passes, oldest first, to (W <= num_windows, L, E) int64; empty passes are left out."""
    used = steps[steps.any((1, 2))]
    if not len(used):
        return np.zeros((0, *steps.shape[1:]), dtype=np.int64)
    parts = np.array_split(used, min(num_windows, len(used)))
    return np.stack([part.sum(0, dtype=np.int64) for part in parts])


def agree_on_plan(result: Any, _manager: Any, _logical_count: Any, *, broadcast_over_world: bool) -> None:
    """Compares the digests of all ranks' plans; where they differ, rank 0's holds for all."""
    if broadcast_over_world:
        return
    from sglang.srt.runtime_context import get_parallel

    group = get_parallel().moe_ep_group
    fields = (result.physical_to_logical_map_cpu, result.logical_to_all_physical_map_cpu)
    content = b"".join(field.contiguous().numpy().tobytes() for field in fields)
    digest = torch.frombuffer(bytearray(hashlib.sha256(content).digest()[:8]), dtype=torch.int64).clone()
    digests = [torch.empty_like(digest) for _ in group.ranks]
    torch.distributed.all_gather(digests, digest, group=group.cpu_group)
    if all(torch.equal(other, digest) for other in digests):
        return
    log.error("the ranks planned differently (digests %s): rank 0's plan holds", [int(other) for other in digests])
    for name in ("physical_to_logical_map", "logical_to_all_physical_map"):
        on_cpu = getattr(result, f"{name}_cpu")
        torch.distributed.broadcast(on_cpu, src=group.ranks[0], group=group.cpu_group)
        getattr(result, name).copy_(on_cpu)
    result.logical_to_all_physical_map_num_valid.copy_((result.logical_to_all_physical_map != -1).sum(-1))


def initialize_with_kernels(original: Callable[..., Any], runner: Any) -> Any:
    """Compiles the planner's kernels while the weights load: no plan ever compiles in a serving scheduler."""
    from sglang.srt.runtime_context import get_exec, get_parallel

    moe, parallel = get_exec().moe, get_parallel()
    if runner.is_draft_worker or not moe.enable_eplb or moe.eplb_algorithm not in own_algorithms():
        return original(runner)
    compiling: WarmUp | None = None
    if parallel.tp_rank % max(1, parallel.tp_size // parallel.nnodes) == 0:
        compiling = warm_up_in_background()  # one rank of each node fills the cache
    result = original(runner)
    start = time.perf_counter()
    if compiling is not None and not compiling.wait():
        log.warning("compiling ahead failed; the kernels are compiled in this process")
    torch.distributed.barrier(group=parallel.moe_ep_group.cpu_group)
    warm_up()
    log.info("the planner's kernels are loaded; the start waited %.1f s for them", time.perf_counter() - start)
    return result


def _oldest_step() -> int:
    """Where SGLang's ring of steps begins: it goes on from there after a dump. 0 where it cannot be seen."""
    from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder

    accumulator = getattr(get_global_expert_distribution_recorder(), "_accumulator", None)
    ring = getattr(accumulator, "_global_physical_count_of_buffered_step", None)
    return int(getattr(ring, "_curr_index", 0))
