"""Replays recorded steps through the loop that runs live: its decision, its planner, its transfer plans.

Each step is scored on the placement in force. Every ``interval`` steps
:func:`~equipoise.manager.planning.plan_rebalance` decides and plans from the last ``interval`` steps, cut into the
windows that a manager would cut. Its plan arrives ``planning_delay`` steps later and is carried out batch by batch: a
batch of the transfer plan commits once its bytes are over the links, at most ``layers_per_chunk`` of them between two
steps, and only then do its maps change. A rebalance begins again when the last batch has committed. All times come from
a :class:`~equipoise.replay.costs.CostModel`.

No rank is simulated: recorded counts are split over replicas as the kind of dispatch would split them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from equipoise.algorithms.registry import HISTORY
from equipoise.config import DispatchScope, EplbConfig
from equipoise.dispatch.policy import DispatchPolicy
from equipoise.load.trace import LoadTrace
from equipoise.load.window_ring import WindowRing
from equipoise.manager.commands import Rebalance
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.replay.costs import CostModel
from equipoise.replay.live_result import LivePlan, LiveResult, StepRecorder
from equipoise.replay.planner import Proposal, propose
from equipoise.replay.scoring import Dispatch, make_scorer
from equipoise.replay.sources import SourceSplit
from equipoise.topology import EpTopology
from equipoise.transfer.execution.profile import experts_over_ranks
from equipoise.transfer.planning.types import TransferBatch


@dataclass(frozen=True)
class LiveSettings:
    """One way to balance.

    Attributes:
        algorithm: None: nothing is ever moved.
        interval: steps between two rebalances, and steps that a plan looks back on.
        forced: carry out every plan, as engines do that rebalance on a timer.
        planning_delay: steps that pass before a plan is there; live, its arrival takes two ticks at least.
        layers_per_chunk: batches committed between two steps.
        dispatch_scope: whose tokens ``batch`` dispatch evens out together.
        active_expert_cost: of ``batch`` dispatch, in tokens; the cost model's if None.
    """

    algorithm: str | None
    interval: int = 128
    dispatch: Dispatch = "weights"
    forced: bool = False
    planning_delay: int = 2
    layers_per_chunk: int = 1
    threshold: float = 1.0
    max_moves_per_layer: int | None = None
    max_staged_experts: int = 4
    num_groups: int | None = None
    dispatch_scope: DispatchScope = "rank"
    active_expert_cost: float | None = None

    def policy(self, costs: CostModel) -> DispatchPolicy:
        """Of ``batch`` dispatch."""
        active = costs.active_expert_cost if self.active_expert_cost is None else self.active_expert_cost
        return DispatchPolicy("batch", scope=self.dispatch_scope, active_expert_cost=active)

    @property
    def name(self) -> str:
        return "nothing" if self.algorithm is None else self.algorithm + (" on a timer" if self.forced else "")


@dataclass
class _Transfer:
    """A batch on its way."""

    layer: int
    batch: TransferBatch
    seconds: float  # on the busiest link
    commit_seconds: float
    experts: int
    crossing: int
    arrives: float = field(default=0.0)


class _Loop:
    """State of one replay: the placement in force, a plan to come, batches on their way."""

    def __init__(
        self, metadata: ExpertLocationMetadata, settings: LiveSettings, costs: CostModel, sources: SourceSplit
    ) -> None:
        self.metadata = metadata
        self.settings = settings
        self.clock = 0.0
        self._sources = sources
        self.plans: list[LivePlan] = []
        self._costs = costs
        self._policy = settings.policy(costs)
        self.read_placement()
        self._config = EplbConfig(
            enable_eplb=True,
            eplb_algorithm=settings.algorithm or "auto",
            eplb_rebalance_num_iterations=settings.interval,
            eplb_min_rebalancing_utilization_threshold=settings.threshold,
            eplb_max_moves_per_layer=settings.max_moves_per_layer,
        )
        self._ring = WindowRing(
            metadata.num_layers,
            metadata.num_logical_experts,
            num_rows=2 * HISTORY,
            period=settings.interval,
            device="cpu",
        )
        self._steps_since_last = 0
        self._proposal: Proposal | None = None
        self._ready_at = 0
        self._queue: deque[_Transfer] = deque()

    def read_placement(self) -> None:
        """Has the steps to come scored on the placement of now."""
        self.scorer = make_scorer(self.metadata, self.settings.dispatch, self._sources, self._policy)

    def count(self, counts: np.ndarray) -> None:
        """Adds a step to the load window."""
        self._ring.open_row().add_(torch.from_numpy(np.rint(counts).astype(np.int64)))

    def tick(self, step: int) -> float:
        """Between two steps; seconds for which the next one has to wait."""
        if self.settings.algorithm is None:
            return 0.0
        if self._queue:
            return self._commit_arrived()
        if self._proposal is not None:
            if step >= self._ready_at:
                self._begin(self._proposal, step)
                self._proposal = None
            return 0.0
        self._steps_since_last += 1
        if self._steps_since_last >= self.settings.interval:
            self._plan(step)
        return 0.0

    def _plan(self, step: int) -> None:
        self._steps_since_last = 0
        self._ready_at = step + self.settings.planning_delay
        self._proposal = propose(
            self._ring.windows(HISTORY, self.settings.interval).numpy(),
            self.metadata.clone("cpu"),
            self._config,
            request=Rebalance(force=True) if self.settings.forced else None,
            window_steps=self._ring.covered_steps(self.settings.interval),
            num_groups=self.settings.num_groups,
            max_staged_experts=self.settings.max_staged_experts,
            clock=time.perf_counter,
            dispatch="weights" if self.settings.dispatch == "static" else self.settings.dispatch,
        )

    def _begin(self, proposal: Proposal, step: int) -> None:
        moved = {layer.layer_id for layer in proposal.transfer.layers} if proposal.transfer else set()
        size = self._costs.shape.expert_bytes
        if proposal.target is not None:
            stay = [layer for layer in range(self.metadata.num_layers) if layer not in moved]
            self.metadata.update_layers_(proposal.target, stay)
            self._target = proposal.target
            self._start_transfers(proposal)
            self.read_placement()
        experts = sum(entry.experts for entry in self._queue)
        crossing = sum(entry.crossing for entry in self._queue)
        self.plans.append(
            LivePlan(
                step, proposal.action, proposal.reason, proposal.slots_changed, experts, crossing,
                experts * size, crossing * size, proposal.seconds,
            )
        )  # fmt: skip

    def _start_transfers(self, proposal: Proposal) -> None:
        if proposal.transfer is None:
            return
        topology = self.metadata.topology
        for layer in proposal.transfer.layers:
            for batch in layer.batches:
                table = experts_over_ranks(batch, topology)
                commit = self._costs.commit_seconds(int(table[:, 1].max(initial=0)))
                moved, crossing = int(table[:, 1].sum()), int(table[:, 3].sum())
                seconds = self._costs.transfer_seconds(table)
                self._queue.append(_Transfer(layer.layer_id, batch, seconds, commit, moved, crossing))
        at = self.clock
        for entry in self._queue:
            at += entry.seconds
            entry.arrives = at

    def _commit_arrived(self) -> float:
        """Commits what has arrived. As live, a layer's shares hold once its last batch is there."""
        stall, commits = 0.0, 0
        while self._queue and commits < self.settings.layers_per_chunk and self._queue[0].arrives <= self.clock:
            entry = self._queue.popleft()
            if np.array_equal(entry.batch.new_map, self._target.physical_to_logical_map[entry.layer].numpy()):
                self.metadata.update_layers_(self._target, [entry.layer])
            else:
                self.metadata.update_layer_(entry.layer, entry.batch.new_map.copy())
            stall += entry.commit_seconds
            commits += 1
        if commits:
            self.read_placement()
        return stall


def replay_live(
    trace: LoadTrace,
    topology: EpTopology,
    settings: LiveSettings,
    costs: CostModel,
    *,
    initial: ExpertLocationMetadata | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> LiveResult:
    """Plays a trace step by step.

    Args:
        topology: where the slots lie; they must hold every expert.
        initial: the first placement; the trivial one if None.
        on_step: called after each step.

    Raises:
        InvalidInputError: slots that cannot hold the experts, an unknown algorithm.
    """
    start = initial or ExpertLocationMetadata.trivial(trace.num_layers, trace.num_logical_experts, topology)
    live = ExpertLocationMetadata.from_physical_to_logical(
        start.physical_to_logical_map,
        trace.num_logical_experts,
        topology,
        dispatch_weights=start.dispatch_weights,
        max_replicas=topology.num_slots - trace.num_logical_experts + 1,
    )
    loop = _Loop(live, settings, costs, SourceSplit(trace, topology.num_ranks, costs.shape.top_k))
    steps = StepRecorder(trace, topology, costs)
    for index in range(trace.num_steps):
        counts = trace.logical_count[index]
        if counts.any():
            loop.clock += steps.add(counts, loop.scorer.step(counts, index))
            loop.count(counts)
            stall = loop.tick(index + 1)
            steps.stall(stall)
            loop.clock += stall
        on_step()
    return steps.result(settings.name, settings.dispatch, settings.interval, loop.plans, live)
