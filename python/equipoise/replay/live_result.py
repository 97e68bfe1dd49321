"""What a replay of steps found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from equipoise.dispatch.score import StepLoad
from equipoise.load.trace import LoadTrace
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.replay.costs import CostModel
from equipoise.replay.scoring import force_balanced
from equipoise.replay.sources import top_k_of
from equipoise.topology import EpTopology


@dataclass(frozen=True)
class LivePlan:
    """One rebalance that ended in a decision."""

    step: int  # before which it took effect, or began to
    action: str  # skip, reweight or migrate
    reason: str
    slots_changed: int
    experts_moved: int  # over a wire
    experts_moved_across_nodes: int
    bytes_moved: int
    bytes_moved_across_nodes: int
    planning_seconds: float  # of this machine


@dataclass(frozen=True, eq=False)
class LiveResult:
    """One way to balance, step by step. Steps without a token are left out.

    Attributes:
        balancedness: (T, L) float32; NaN where a layer saw no token.
        expert_seconds: (T,) of the expert layers; ``lost_seconds`` of them waiting for the slowest rank.
        other_seconds: (T,) of the rest of a step.
        stall_seconds: (T,) in which commits held up the next step.
        tokens: of the whole trace.
    """

    name: str
    dispatch: str
    interval: int
    topology: EpTopology
    balancedness: np.ndarray
    expert_seconds: np.ndarray
    lost_seconds: np.ndarray
    other_seconds: np.ndarray
    stall_seconds: np.ndarray
    tokens: float
    plans: tuple[LivePlan, ...]
    final_placement: ExpertLocationMetadata | None

    @property
    def mean_balancedness(self) -> float:
        """Over steps and layers that saw tokens."""
        return float(np.nanmean(self.balancedness)) if self.balancedness.size else float("nan")

    @property
    def seconds(self) -> float:
        """All steps, with what commits held up."""
        return float((self.expert_seconds + self.other_seconds + self.stall_seconds).sum())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else float("nan")

    @property
    def bytes_moved(self) -> int:
        return sum(plan.bytes_moved for plan in self.plans)

    @property
    def num_migrations(self) -> int:
        return sum(plan.action == "migrate" for plan in self.plans)

    def to_dict(self) -> dict[str, Any]:
        """JSON values: summaries, balancedness of each step (mean over layers), plans."""
        with np.errstate(invalid="ignore"):
            seen = ~np.isnan(self.balancedness)
            per_step = np.where(seen, self.balancedness, 0).sum(1) / np.maximum(seen.sum(1), 1)
        return {
            "name": self.name,
            "dispatch": self.dispatch,
            "interval": self.interval,
            "topology": asdict(self.topology),
            "mean_balancedness": self.mean_balancedness,
            "seconds": self.seconds,
            "lost_to_imbalance_seconds": float(self.lost_seconds.sum()),
            "stall_seconds": float(self.stall_seconds.sum()),
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "bytes_moved": self.bytes_moved,
            "balancedness_per_step": [round(float(value), 5) for value in per_step],
            "plans": [asdict(plan) for plan in self.plans],
        }

    def __repr__(self) -> str:
        return (
            f"LiveResult({self.name!r}: balancedness {self.mean_balancedness:.3f}, "
            f"{self.tokens_per_second:,.0f} tokens/s, {self.num_migrations} migrations)"
        )


class StepRecorder:
    """Collects the steps of a replay."""

    def __init__(self, trace: LoadTrace, topology: EpTopology, costs: CostModel) -> None:
        self._top_k = top_k_of(trace, costs.shape.top_k)
        self._topology = topology
        self._costs = costs
        self._balancedness: list[np.ndarray] = []
        self._seconds: list[tuple[float, float, float]] = []  # experts, lost, the rest
        self._stall: list[float] = []
        self._tokens = 0.0

    def add(self, counts: np.ndarray, load: StepLoad) -> float:
        """Adds a step; its seconds."""
        topology, costs = self._topology, self._costs
        even = force_balanced(counts, topology.num_ranks, topology.num_slots)
        best, _ = costs.step_seconds(even.tokens, even.activated, topology.num_nodes, topology.num_ranks)
        seconds, lost = costs.step_seconds(load.tokens, load.activated, topology.num_nodes, topology.num_ranks)
        other = best * (1 - costs.balanced_share) / costs.balanced_share
        self._balancedness.append(load.balancedness().astype(np.float32))
        self._seconds.append((seconds, lost, other))
        self._stall.append(0.0)
        self._tokens += float(counts.sum(-1, dtype=np.float64).max()) / self._top_k
        return seconds + other

    def stall(self, seconds: float) -> None:
        """Adds to what the last step's successor waits."""
        self._stall[-1] += seconds

    def result(
        self,
        name: str,
        dispatch: str,
        interval: int,
        plans: Sequence[LivePlan] = (),
        final: ExpertLocationMetadata | None = None,
    ) -> LiveResult:
        seconds = np.array(self._seconds, dtype=np.float64).reshape(-1, 3)
        return LiveResult(
            name=name,
            dispatch=dispatch,
            interval=interval,
            topology=self._topology,
            balancedness=np.stack(self._balancedness) if self._balancedness else np.zeros((0, 0), np.float32),
            expert_seconds=seconds[:, 0],
            lost_seconds=seconds[:, 1],
            other_seconds=seconds[:, 2],
            stall_seconds=np.array(self._stall),
            tokens=self._tokens,
            plans=tuple(plans),
            final_placement=final,
        )
