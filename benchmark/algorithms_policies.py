"""The placement policies that are compared: ours, and the neighbours' own code from their own packages, unmodified.

What cannot be had (see neighbours.py) is listed with the reason, never replaced by a copy.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from algorithms_uniform import rebalance_uniform
from equipoise.algorithms.rebalance import rebalance_experts
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology
from neighbours import (
    SGLANG,
    SGLANG_WITH_DEEPSEEKS_EPLB,
    VLLM,
    VLLM_ASCEND,
    Unavailable,
    load_file,
    stand_in,
)

FLASHLB_WINDOWS = 4
OUR_WINDOWS = 8

Plan = Callable[[np.ndarray, ExpertLocationMetadata], ExpertLocationMetadata]
Policy = Callable[[EpTopology], Plan]


def never(_: EpTopology) -> Plan:
    return lambda _, current: current


def ours(algorithm: str = "equipoise", **options: Any) -> Policy:
    def make(topology: EpTopology) -> Plan:
        return lambda windows, current: rebalance_experts(
            windows[-OUR_WINDOWS:], topology, algorithm=algorithm, current=current, num_threads=1, **options
        )

    return make


def ours_from_nothing(algorithm: str = "equipoise") -> Policy:
    return lambda topology: lambda windows, _: rebalance_experts(windows, topology, algorithm=algorithm)


def uniform(move_price: float) -> Policy:
    return lambda topology: (
        lambda windows, current: rebalance_uniform(windows[-OUR_WINDOWS:], topology, current, move_price)
    )


def full_replan(topology: EpTopology) -> Plan:
    """Our plan from nothing, its ranks renamed for the fewest moves (Hungarian), whatever that costs."""

    def plan(windows: np.ndarray, current: ExpertLocationMetadata) -> ExpertLocationMetadata:
        fresh = rebalance_experts(windows[-OUR_WINDOWS:], topology, num_threads=1)
        size, ranks = topology.slots_per_rank, topology.num_ranks
        shape = (-1, ranks, size)
        old = current.physical_to_logical_map.numpy().reshape(shape)
        new = fresh.physical_to_logical_map.numpy().reshape(shape).copy()
        weights = fresh.dispatch_weights.numpy().reshape(shape).copy()
        held = np.zeros((len(old), ranks, current.num_logical_experts), dtype=np.int64)
        np.put_along_axis(held, old, 1, axis=2)
        for layer in range(len(old)):
            shared = held[layer][:, new[layer]].sum(-1)  # (old rank, new rank)
            order = linear_sum_assignment(-shared)[1]
            new[layer], weights[layer] = new[layer][order], weights[layer][order]
        return ExpertLocationMetadata.from_physical_to_logical(
            new.reshape(len(old), -1),
            current.num_logical_experts,
            topology,
            dispatch_weights=weights.reshape(len(old), -1),
        )

    return plan


def baselines(cache: Path) -> tuple[dict[str, Policy], dict[str, str]]:
    """Policies by name, and what is missing with the reason. Sources and their SHA-256 are in :func:`sources`."""
    found: dict[str, Policy] = {}
    missing: dict[str, str] = {}
    for names, load in (
        (("vllm",), _vllm),
        (("sglang deepseek",), _sglang),
        (("sglang deepseek_vec",), _sglang_vec),
        (("deepseek original",), _deepseek_original),
        (("ascend swift", "ascend flashlb"), _ascend),
    ):
        try:
            found.update(zip(names, load(cache), strict=True))
        except Unavailable as error:
            missing[", ".join(names)] = str(error)
    return found, missing


def sources() -> dict[str, str]:
    """SHA-256 of each neighbour's module that was run."""
    return {
        name: hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()
        for name, module in sorted(sys.modules.items())
        if name.startswith(("vllm.", "sglang.", "vllm_ascend.")) and getattr(module, "__file__", None)
    }


def _vllm(cache: Path) -> tuple[Policy]:
    root = VLLM.fetch(cache) / "vllm/distributed/eplb/policy"
    stand_in("vllm", "vllm.distributed", "vllm.distributed.eplb", "vllm.distributed.eplb.policy")
    load_file("vllm.distributed.eplb.policy.abstract", root / "abstract.py")
    policy = load_file("vllm.distributed.eplb.policy.default", root / "default.py").DefaultEplbPolicy

    def make(topology: EpTopology) -> Plan:
        def plan(windows: np.ndarray, current: ExpertLocationMetadata) -> ExpertLocationMetadata:
            placed = policy.rebalance_experts(
                torch.from_numpy(windows[-1]),
                topology.num_slots,
                1,
                topology.num_nodes,
                topology.num_ranks,
                current.physical_to_logical_map,
            )
            return _placement(placed, current)

        return plan

    return (make,)


def _sglang(cache: Path) -> tuple[Policy]:
    module = load_file("sglang.eplb_deepseek", SGLANG.fetch(cache) / "sglang/srt/eplb/eplb_algorithms/deepseek.py")

    def plan(windows: np.ndarray, topology: EpTopology) -> torch.Tensor:
        load = torch.from_numpy(windows[-1])
        return module.rebalance_experts(load, topology.num_slots, 1, 1, topology.num_ranks, False)[0]

    return (_from_nothing(plan),)


def _sglang_vec(cache: Path) -> tuple[Policy]:
    stand_in("sglang", "sglang.srt")
    stand_in("sglang.srt.utils", get_bool_env_var=lambda _: False)
    path = SGLANG.fetch(cache) / "sglang/srt/eplb/eplb_algorithms/deepseek_vec.py"
    module = load_file("sglang.eplb_deepseek_vec", path)

    def plan(windows: np.ndarray, topology: EpTopology) -> torch.Tensor:
        load = torch.from_numpy(windows[-1:].astype(np.float32))
        return module.rebalance_experts(load, topology.num_slots, topology.slots_per_rank, 1, 1, False)[0]

    return (_from_nothing(plan),)


def _deepseek_original(cache: Path) -> tuple[Policy]:
    """github.com/deepseek-ai/EPLB: its functions as an early SGLang carried them, verbatim."""
    path = SGLANG_WITH_DEEPSEEKS_EPLB.fetch(cache) / "sglang/srt/eplb/eplb_algorithms/deepseek.py"
    module = load_file("sglang.eplb_deepseek_original", path)

    def plan(windows: np.ndarray, topology: EpTopology) -> torch.Tensor:
        load = torch.from_numpy(windows[-1])
        return module.rebalance_experts(load, topology.num_slots, 1, 1, topology.num_ranks, False)[0]

    return (_from_nothing(plan),)


def _ascend(cache: Path) -> tuple[Policy, Policy]:
    root = VLLM_ASCEND.fetch(cache) / "vllm_ascend/eplb/core/policy"
    group = types.SimpleNamespace(world_size=0)
    stand_in("vllm")
    stand_in("vllm.logger", logger=logging.getLogger("vllm"))
    package = "vllm_ascend.eplb.core.policy"
    stand_in("vllm_ascend", "vllm_ascend.distributed", "vllm_ascend.eplb", "vllm_ascend.eplb.core", package)
    stand_in("vllm_ascend.distributed.parallel_state", get_dynamic_eplb_group=lambda: group)
    load_file(f"{package}.policy_abstract", root / "policy_abstract.py")
    flashlb = load_file(f"{package}.policy_flashlb", root / "policy_flashlb.py")
    devices = types.SimpleNamespace(count=1)
    if "torch_npu" not in sys.modules and importlib.util.find_spec("torch_npu") is None:
        stand_in("torch_npu")
    torch.npu = types.SimpleNamespace(device_count=lambda: devices.count)  # type: ignore[attr-defined]
    swift = load_file(f"{package}.policy_swift_balancer", root / "policy_swift_balancer.py")

    def slot_counts(windows: np.ndarray, current: ExpertLocationMetadata) -> np.ndarray:
        """(T, L, G, S): what each slot counted, an expert's tokens split evenly as their dispatch does."""
        p2l = current.physical_to_logical_map.numpy()
        counted = np.take_along_axis(
            windows / current.num_replicas.numpy(), np.broadcast_to(p2l, (len(windows), *p2l.shape)), 2
        )
        return counted.reshape(*counted.shape[:2], current.topology.num_ranks, -1)

    def table(current: ExpertLocationMetadata) -> torch.Tensor:
        return current.physical_to_logical_map.view(current.num_layers, current.topology.num_ranks, -1).clone()

    def make_swift(topology: EpTopology) -> Plan:
        devices.count = topology.ranks_per_node
        policy = swift.SwiftBalanceEplb()

        def plan(windows: np.ndarray, current: ExpertLocationMetadata) -> ExpertLocationMetadata:
            counted = torch.from_numpy(slot_counts(windows[-1:], current)[0])
            return _placement(policy.rebalance_experts(table(current), counted)[2], current)

        return plan

    def make_flashlb(topology: EpTopology) -> Plan:
        state: dict[str, Any] = {"windows": 0}

        def plan(windows: np.ndarray, current: ExpertLocationMetadata) -> ExpertLocationMetadata:
            group.world_size = topology.num_ranks
            seen = windows[-FLASHLB_WINDOWS:]
            if len(seen) != state["windows"]:  # its buffers are sized by the first call
                state.update(windows=len(seen), policy=flashlb.FlashLB())
            counted = torch.from_numpy(slot_counts(seen, current))
            return _placement(state["policy"].rebalance_experts(table(current), counted)[2], current)

        return plan

    return make_swift, make_flashlb


def _from_nothing(solve: Callable[[np.ndarray, EpTopology], torch.Tensor]) -> Policy:
    return lambda topology: lambda windows, current: _placement(solve(windows, topology), current)


def _placement(placed: Any, current: ExpertLocationMetadata) -> ExpertLocationMetadata:
    array = np.asarray(placed).reshape(current.num_layers, -1).astype(np.int64)
    return ExpertLocationMetadata.from_physical_to_logical(array, current.num_logical_experts, current.topology)
