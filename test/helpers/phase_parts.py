"""The phase machine on one rank, with a clock that is set by hand and stand-ins for what it drives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from equipoise import EpTopology, ExpertLocationMetadata
from equipoise.config import EplbConfig
from equipoise.distributed.in_memory import InMemoryHub
from equipoise.errors import TransferCancelled, TransferError
from equipoise.manager.background_planner import PlanningFailed, RebalancePlanner
from equipoise.manager.failures import FailureWatch
from equipoise.manager.live_placement import LivePlacement
from equipoise.manager.phases import Rebalancing
from equipoise.manager.reporting import RebalanceTimer, Reporter
from equipoise.manager.reports import RebalanceReport
from equipoise.transfer.execution.profile import LayerProfile

TOPOLOGY = EpTopology(2, 1, 5)
PERIOD = 3


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Load:
    """Two windows, the older of which has all tokens on expert 0, the newer on expert 7."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int | None]] = []
        self.on_gather: Callable[[], None] = lambda: None

    def local_windows(self, num_windows: int, asked: int | None = None) -> torch.Tensor:
        self.asked.append((num_windows, asked))
        self.on_gather()
        load = torch.ones(2, 2, 8, dtype=torch.int64)
        load[0, :, 0] = load[1, :, 7] = 40
        return load

    def sum_over_ranks(self, counts: torch.Tensor) -> torch.Tensor:
        return counts

    def window_steps(self, asked: int | None) -> int:
        return asked or PERIOD


class Background:
    """Plans when polled, once ``ready``."""

    def __init__(self) -> None:
        self.job: Any = None
        self.ready = True
        self.failure: str | None = None
        self.abandoned = 0

    def abandon(self) -> None:
        self.abandoned += 1

    def start(self, job: Callable[[], Any]) -> None:
        self.job = job

    def poll(self, *, idle: bool) -> Any:
        del idle
        if self.failure is not None:
            raise PlanningFailed(self.failure)
        return self.job() if self.ready else None


class Migration:
    """Arrives after ``steps`` calls, or raises."""

    def __init__(self) -> None:
        self.steps = 1
        self.error: TransferError | None = None
        self.begun: list[Any] = []
        self.layers_pending = 0
        self.max_staged_experts = 1
        self.peak_staging_bytes = 77
        self.cancelled: str | None = None
        self.profiles = [LayerProfile(0, 0.1, 0.2, 0.3, 4, 5, 4, 0)]
        self.on_advance: Callable[[], None] = lambda: None

    def begin(self, target: Any, plan: Any) -> None:
        self.begun.append((target, plan))
        self.cancelled = None
        self.layers_pending = self.steps

    def advance(self, *, idle: bool) -> bool:
        del idle
        self.on_advance()
        if self.error is not None:
            raise self.error
        if self.cancelled is not None:
            raise TransferCancelled(self.cancelled)
        self.layers_pending -= 1
        return self.layers_pending <= 0

    def end_tick(self) -> None:
        pass

    def cancel(self, reason: str) -> None:
        self.cancelled = reason

    def bytes_over_ranks(self) -> np.ndarray:
        return np.array([[10, 20, 0, 0], [20, 10, 0, 0]])


class Parts:
    def __init__(self, **options: Any) -> None:
        self.clock, self.load, self.background, self.migration = Clock(), Load(), Background(), Migration()
        self.reports: list[RebalanceReport] = []
        config = EplbConfig(
            eplb_algorithm="deepseek", ep_num_redundant_experts=2, eplb_rebalance_num_iterations=PERIOD, **options
        )
        metadata = ExpertLocationMetadata.trivial(2, 8, TOPOLOGY, max_replicas=3)
        placement, timer = LivePlacement(metadata, [3, 4]), RebalanceTimer(self.clock)
        self.failures = FailureWatch(InMemoryHub(1).communicator(0))
        planner = RebalancePlanner(
            config, placement, self.load, self.background, self.failures, timer,  # type: ignore[arg-type]
            dispatch="weights", num_groups=4, max_staged_experts=1, clock=self.clock,
        )  # fmt: skip
        self.reporter = Reporter(placement, self.migration, timer, self.failures, self.reports.append, profile=False)
        self.rebalancing = Rebalancing(config, placement, planner, self.migration, self.failures, self.reporter, timer)
        self.steps = 0

    def step(self, *, counted: bool = True) -> None:
        self.rebalancing.end_step(counted=counted)
        self.steps += 1
        self.tick()

    def tick(self, *, idle: bool = False) -> None:
        self.rebalancing.tick(forward_pass_id=self.steps, idle=idle)

    def steps_until_planning(self) -> int:
        for count in range(1, 10_000):
            self.step()
            if self.rebalancing.phase == "planning":
                return count
        raise AssertionError("no rebalance is ever due")
