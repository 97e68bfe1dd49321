"""What a host says of itself to a manager, beside options, weights and groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from equipoise.algorithms.problem import DispatchKind
from equipoise.config import EplbConfig, require
from equipoise.manager.failures import FailureWatch
from equipoise.manager.live_placement import LivePlacement, OnLayersCommitted
from equipoise.manager.migration import Migration
from equipoise.manager.reporting import OnReport

MakeMigration = Callable[[LivePlacement, FailureWatch], Migration]
"""A host's mover, made for the live placement; errors of one rank are told to the watch."""


@dataclass(frozen=True)
class HostTraits:
    """In what a host differs from the embedded engine, whose traits are the defaults."""

    layer_ids: Sequence[int] | None = None
    """The host's number of each MoE layer, for hosts whose first layers are dense; None: 0 to L - 1."""

    dispatch: DispatchKind | None = None
    """How the host itself splits an expert's tokens over replicas, which is what plans are made for: there is no
    dispatcher of ours, and ``route`` is not called. None: ours does, by ``ep_dispatch_algorithm``."""

    replicated_counts: bool = False
    """Each rank counts the tokens of all ranks (no all-to-all backend): nothing is summed over ranks."""

    num_groups: int | None = None
    """Groups of group-limited routing, if the model has it."""

    tells_phases: bool = False
    """Calls ``begin_forward_pass`` before each forward pass; needed for ``eplb_load_phase`` other than ``all``."""

    on_layers_committed: OnLayersCommitted | None = None
    """Called inside each commit, on every rank, before anything else runs: the host's own maps follow."""

    on_report: OnReport | None = None
    """Called with every rebalance that ends, requested or not, on every rank."""

    def check(self, config: EplbConfig) -> None:
        """
        Raises:
            ConfigError: options that need what the host does not give.
        """
        require(
            config.eplb_load_phase == "all" or self.tells_phases,
            "eplb_load_phase",
            config.eplb_load_phase,
            "'all' in a host that does not tell phases of forward passes",
        )

    def planned_dispatch(self, config: EplbConfig) -> DispatchKind:
        """What plans are made for. ``static`` takes the nearest replica of those with a planned share."""
        if self.dispatch is not None:
            return self.dispatch
        return "batch" if config.ep_dispatch_algorithm == "batch" else "weights"
