"""What every way to balance is held against: an oracle, and a load that is even by decree."""

from __future__ import annotations

import numpy as np

from equipoise.algorithms.rebalance import rebalance_experts
from equipoise.dispatch.policy import DispatchPolicy
from equipoise.errors import InvalidInputError
from equipoise.load.trace import LoadTrace
from equipoise.placement.balancedness import balancedness
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.replay.costs import CostModel
from equipoise.replay.live_result import LiveResult, StepRecorder
from equipoise.replay.scoring import Dispatch, force_balanced, make_scorer
from equipoise.replay.sources import SourceSplit
from equipoise.topology import EpTopology

ORACLE_ALGORITHMS = ("equipoise", "deepseek")


def oracle(
    trace: LoadTrace,
    topology: EpTopology,
    costs: CostModel,
    *,
    interval: int,
    dispatch: Dispatch,
    policy: DispatchPolicy | None = None,
    num_groups: int | None = None,
) -> LiveResult:
    """For each stretch of ``interval`` steps and each layer, the better plan made from that very stretch.

    Moving is free. Not a proven optimum: the best that these algorithms find with the future in hand.
    """
    steps = StepRecorder(trace, topology, costs)
    sources = SourceSplit(trace, topology.num_ranks, costs.shape.top_k)
    policy = policy or DispatchPolicy("batch", active_expert_cost=costs.active_expert_cost)
    for start in range(0, trace.num_steps, interval):
        load = trace.total(slice(start, start + interval))
        if not load.any():
            continue
        best = _best_of(load, topology, num_groups)
        scorer = make_scorer(best, dispatch, sources, policy)
        for index in range(start, min(start + interval, trace.num_steps)):
            counts = trace.logical_count[index]
            if counts.any():
                steps.add(counts, scorer.step(counts, index))
    return steps.result("oracle", dispatch, interval)


def _best_of(load: np.ndarray, topology: EpTopology, num_groups: int | None) -> ExpertLocationMetadata:
    plans = []
    for algorithm in ORACLE_ALGORITHMS:
        try:
            plans.append(rebalance_experts(load, topology, algorithm=algorithm, num_groups=num_groups))
        except InvalidInputError:
            continue  # it cannot plan for this topology
    if not plans:
        return ExpertLocationMetadata.trivial(load.shape[0], load.shape[1], topology)
    scores = np.nan_to_num(np.stack([balancedness(load, plan).numpy() for plan in plans]), nan=1.0)
    best = scores.argmax(0)
    rows = [plans[int(choice)].physical_to_logical_map[layer].numpy() for layer, choice in enumerate(best)]
    weights = [plans[int(choice)].dispatch_weights[layer].numpy() for layer, choice in enumerate(best)]
    return ExpertLocationMetadata.from_physical_to_logical(
        np.stack(rows), load.shape[1], topology, dispatch_weights=np.stack(weights)
    )


def forced_even(trace: LoadTrace, topology: EpTopology, costs: CostModel) -> LiveResult:
    """Every rank has the mean load in every step and layer: what remains is not imbalance."""
    steps = StepRecorder(trace, topology, costs)
    for counts in trace.logical_count:
        if counts.any():
            steps.add(counts, force_balanced(counts, topology.num_ranks, topology.num_slots))
    return steps.result("force-balanced", "-", 0)
