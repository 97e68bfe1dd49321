"""``equipoise plan``: a placement from recorded load, in the format of the engine that is to start with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from equipoise.algorithms.rebalance import rebalance_experts
from equipoise.cli.offline.cluster import num_ranks_of
from equipoise.cli.offline.recordings import opened
from equipoise.errors import ConfigError
from equipoise.formats.atomic_file import write_whole
from equipoise.formats.expert_location import expert_location_content
from equipoise.formats.readers.tensorrt_llm import write_assignments
from equipoise.formats.readers.vllm_ascend import write_expert_map
from equipoise.load.merge import merge_traces
from equipoise.load.trace import LoadTrace
from equipoise.placement.balancedness import balancedness, mean_balancedness
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology

if TYPE_CHECKING:
    from equipoise.cli.offline.balance_arguments import Plan

_WINDOWS = 8


def run_plan(arguments: Plan, console: Console) -> int:
    """Plans and writes. Returns 0.

    Raises:
        InvalidInputError: a recording that cannot be read, slots that do not fit, an output that cannot be written.
    """
    with opened(arguments.traces, arguments.reading, console) as traces:
        trace = merge_traces(traces)
        topology = EpTopology.for_experts(
            trace.num_logical_experts,
            arguments.num_redundant_experts,
            num_ranks_of(arguments.cluster),
            arguments.cluster.num_nodes,
        )
        planned = rebalance_experts(
            _windows(trace),
            topology,
            algorithm=arguments.algorithm,
            num_groups=arguments.cluster.num_groups,
            dispatch=arguments.dispatch,
        )
        if arguments.dispatch == "even":
            planned = ExpertLocationMetadata.from_physical_to_logical(
                planned.physical_to_logical_map, trace.num_logical_experts, topology
            )
        before = ExpertLocationMetadata.trivial(trace.num_layers, trace.num_logical_experts, topology)
        total = trace.total()
        scores = [mean_balancedness(balancedness(total, each)) for each in (before, planned)]
        _write(planned, trace.layer_ids, arguments.format, arguments.out)
    console.print(
        f"balancedness of this load: {scores[0] or 0:.3f} as an engine starts without a plan, "
        f"{scores[1] or 0:.3f} with it ({topology.num_slots} slots on {topology.num_ranks} ranks, dispatch "
        f"{arguments.dispatch})",
        highlight=False,
    )
    if arguments.dispatch == "weights" and arguments.format != "equipoise":
        console.print(
            f"  note: {arguments.format} has no place for dispatch weights and will share tokens alike; plan with "
            "--dispatch even for it",
            style="yellow",
        )
    console.print(f"written: {arguments.out}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _windows(trace: LoadTrace) -> np.ndarray:
    parts = np.array_split(np.arange(trace.num_steps), min(_WINDOWS, trace.num_steps))
    return np.stack([trace.total(slice(int(part[0]), int(part[-1]) + 1)) for part in parts if len(part)])


def _write(planned: ExpertLocationMetadata, layer_ids: np.ndarray, kind: str, path: Path) -> None:
    p2l = planned.physical_to_logical_map.numpy()
    content: Any
    if kind == "trtllm":
        data = write_assignments(p2l, layer_ids.tolist()).encode()
    else:
        content = {
            "equipoise": lambda: expert_location_content(planned),
            "sglang": lambda: {"physical_to_logical_map": p2l.tolist()},  # any other key is an error there
            "vllm-ascend": lambda: write_expert_map(p2l, planned.topology.num_ranks, range(len(p2l))),
        }[kind]()
        data = json.dumps(content).encode()
    try:
        with write_whole(path) as file:
            file.write(data)
    except OSError as error:
        raise ConfigError(f"out {path}: cannot be written: {error.strerror}", field="out") from error
