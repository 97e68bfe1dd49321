"""What a replay found: numbers per window and the summaries made from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from equipoise.errors import ConfigError
from equipoise.load.windows import Windows
from equipoise.placement.balancedness import mean_balancedness
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology


@dataclass(frozen=True)
class PlanRecord:
    """One plan; counts are sums over layers."""

    window: int  # index of the first window it is scored on
    seconds: float
    layers_changed: int
    slots_changed: int
    moves: int
    cross_node_moves: int
    most_slots_changed_in_a_layer: int

    @classmethod
    def of_change(
        cls, window: int, old: ExpertLocationMetadata, new: ExpertLocationMetadata, seconds: float
    ) -> PlanRecord:
        diff = old.diff(new)
        return cls(
            window,
            seconds,
            len(diff.layers),
            int(diff.slots_changed.sum()),
            int(diff.moves.sum()),
            int(diff.cross_node_moves.sum()),
            int(diff.slots_changed.max()),
        )


@dataclass(frozen=True, eq=False)
class ReplayResult:
    """A policy's balancedness on each window from 1 on, beside its two baselines, and what its plans cost.

    ``balancedness``, ``no_rebalancing`` and ``oracle`` are (W - 1, L) float64, NaN where a layer saw no token; every
    average leaves those out.
    """

    policy: str
    topology: EpTopology
    windows: Windows
    history: int
    rebalance_every: int
    expert_bytes: int | None
    balancedness: np.ndarray
    no_rebalancing: np.ndarray
    oracle: np.ndarray
    oracle_algorithms: tuple[str, ...]
    plans: tuple[PlanRecord, ...]
    final_placement: ExpertLocationMetadata

    @property
    def mean_balancedness(self) -> float:
        """Over all scored windows and layers that saw tokens."""
        return _mean(self.balancedness)

    @property
    def mean_no_rebalancing(self) -> float:
        return _mean(self.no_rebalancing)

    @property
    def mean_oracle(self) -> float | None:
        """None if the replay ran without an oracle."""
        return mean_balancedness(self.oracle)

    @property
    def mean_peak_to_average(self) -> float:
        """Mean PAR, at least 1: how much longer the busiest rank works than the average one."""
        return _mean(1.0 / self.balancedness)

    @property
    def worst_window(self) -> float:
        """Lowest mean over layers of any scored window."""
        return float(np.nanmin(np.nanmean(self.balancedness, axis=1)))

    @property
    def slots_changed(self) -> int:
        return sum(plan.slots_changed for plan in self.plans)

    @property
    def moves(self) -> int:
        return sum(plan.moves for plan in self.plans)

    @property
    def cross_node_moves(self) -> int:
        return sum(plan.cross_node_moves for plan in self.plans)

    @property
    def bytes_moved(self) -> int | None:
        """Bytes received over a wire by all ranks; None without ``expert_bytes``."""
        return None if self.expert_bytes is None else self.moves * self.expert_bytes

    @property
    def cross_node_bytes(self) -> int | None:
        return None if self.expert_bytes is None else self.cross_node_moves * self.expert_bytes

    @property
    def planning_seconds_median(self) -> float:
        return float(np.median([plan.seconds for plan in self.plans]))

    @property
    def planning_seconds_max(self) -> float:
        return max(plan.seconds for plan in self.plans)

    @property
    def gap_closed(self) -> float | None:
        """Share of the way from no rebalancing to the oracle; negative where balancing did harm, None without a way."""
        oracle = self.mean_oracle
        if oracle is None or oracle <= self.mean_no_rebalancing:
            return None
        return (self.mean_balancedness - self.mean_no_rebalancing) / (oracle - self.mean_no_rebalancing)

    def to_dict(self) -> dict[str, Any]:
        """JSON values: means, per window and per layer, moves and times."""
        return {
            "algorithm": self.policy,
            "history": self.history,
            **score_summary(self.balancedness),
            "gap_closed": self.gap_closed,
            "slots_changed": self.slots_changed,
            "moves": self.moves,
            "cross_node_moves": self.cross_node_moves,
            "bytes_moved": self.bytes_moved,
            "cross_node_bytes": self.cross_node_bytes,
            "planning_seconds_median": self.planning_seconds_median,
            "planning_seconds_max": self.planning_seconds_max,
            "plans": [asdict(plan) for plan in self.plans],
        }

    def plot(self, axes: Any = None) -> Any:
        """Draws balancedness over windows beside no rebalancing and the oracle.

        Args:
            axes: matplotlib axes; those of a new figure if None.

        Returns:
            The axes.

        Raises:
            ConfigError: matplotlib is not installed.
        """
        if axes is None:
            try:
                from matplotlib.figure import Figure
            except ImportError:
                raise ConfigError("plot needs matplotlib: pip install equipoise[plot]") from None
            axes = Figure(figsize=(9, 4), layout="constrained").subplots()
        for label, values, style in (
            (self.policy, self.balancedness, "-"),
            ("no rebalancing", self.no_rebalancing, "k--"),
            ("oracle", self.oracle, "k:"),
        ):
            if not np.isnan(values).all():
                axes.plot(np.arange(1, len(values) + 1), np.nanmean(values, axis=1), style, label=label)
        axes.set(xlabel="window", ylabel="balancedness, mean over layers", ylim=(0, 1.02))
        axes.legend(loc="lower right")
        return axes

    def __repr__(self) -> str:
        return (
            f"ReplayResult({self.policy!r}: balancedness {self.mean_balancedness:.3f}, "
            f"without rebalancing {self.mean_no_rebalancing:.3f}, {self.slots_changed} slots changed)"
        )


def score_summary(balancedness: np.ndarray) -> dict[str, Any]:
    """Means over everything, per window (from window 1 on) and per layer; None stands for "no token"."""
    return {
        "mean_balancedness": mean_balancedness(balancedness),
        "mean_peak_to_average": mean_balancedness(1.0 / balancedness),
        "balancedness_per_window": [mean_balancedness(row) for row in balancedness],
        "balancedness_per_layer": [mean_balancedness(column) for column in balancedness.T],
    }


def _mean(values: np.ndarray) -> float:
    mean = mean_balancedness(values)
    assert mean is not None, "a window without tokens was scored"
    return mean
