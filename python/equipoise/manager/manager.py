"""EplbManager: the loop of balancing, driven once per forward pass by its host.

::

    begin_forward_pass      what the step holds, where the host knows
    route | record_counts   a router's choice becomes slots, or is only counted         dispatch/, load/
    end_forward_pass        closes the step
    tick                    carries a rebalance on: collect, plan, migrate              phases.py
    submit                  takes an operator's command                                 command_handler.py
    pause, resume           no rebalance while the host does something with its ranks
    weights_changed         the host has loaded weights anew

Every rank has a manager and calls it alike. Planning runs on rank 0 in a thread, overlapped with the forward passes;
its result is broadcast, so all ranks follow one plan. Weights travel in a background thread too (mode ``async``) or
between forward passes (``chunked``, ``sync``). Layers commit between two forward passes, the same ones on all ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch

from equipoise.algorithms.registry import HISTORY, check_algorithm
from equipoise.config import EplbConfig
from equipoise.dispatch.dispatcher import ExpertDispatcher
from equipoise.distributed.communicator import Communicator
from equipoise.formats.raw_trace import StepPhase
from equipoise.jit.warming import WarmUp
from equipoise.load.recorder import ExpertDistributionRecorder
from equipoise.manager.background_planner import BackgroundPlanner, RebalancePlanner
from equipoise.manager.command_handler import CommandHandler, PendingReply
from equipoise.manager.commands import Command, Pause, Resume
from equipoise.manager.failures import FailureWatch
from equipoise.manager.host import HostTraits, MakeMigration
from equipoise.manager.live_placement import LivePlacement
from equipoise.manager.phases import Rebalancing
from equipoise.manager.planning import Plan
from equipoise.manager.reporting import RebalanceTimer, Reporter
from equipoise.manager.reports import Phase
from equipoise.manager.warm_up import compile_kernels_in_background, load_compiled_kernels
from equipoise.manager.weight_migration import weight_migration
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.transfer.memory.store import ExpertWeights

R = TypeVar("R")


class EplbManager:
    """Balancing for one rank.

    Args:
        config: options; a requested rebalance works without ``enable_eplb``.
        expert_weights: of this rank. ``[layer][i]``: the live tensors of a MoE layer, each (slots_per_rank, ...), any
            dtype, row ``i`` belonging to local slot ``i``; written between two forward passes. Or, where forward passes
            look up the row of a slot, an ``ExpertPool``. None: ``migration`` moves them.
        metadata: the live placement, changed in place; built with ``max_replicas = R + 1``.
        communicator: over the expert-parallel ranks, for the serving thread; CPU tensors and objects travel on it.
        transfer_communicator: with groups of its own, for the experts; needed in mode ``async``, else ``communicator``.
        host: in what the host differs from the embedded engine.
        migration: makes another mover than ours.
        clock: seconds, monotonic.
        wall_clock: seconds since the epoch, for file names.

    Attributes:
        placement: the live placement, with a copy on the CPU.
        recorder: what is counted.
        failures: takes what the host's own code round this manager raises on one rank, where that rank must go on with
            the messages that the others wait for; all stop balancing with the next rebalance at the latest.

    Raises:
        ConfigError: an algorithm, weights, budgets, a load phase that cannot be; no communicator for mode ``async``.
    """

    def __init__(
        self,
        config: EplbConfig,
        expert_weights: ExpertWeights | None,
        metadata: ExpertLocationMetadata,
        communicator: Communicator,
        *,
        transfer_communicator: Communicator | None = None,
        host: HostTraits | None = None,
        migration: MakeMigration | None = None,
        clock: Callable[[], float] = time.perf_counter,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        host = host or HostTraits()
        self._planned_dispatch = dispatch = host.planned_dispatch(config)
        check_algorithm(config.eplb_algorithm, field="eplb_algorithm", dispatch=dispatch)
        host.check(config)
        self._rank = communicator.rank
        self.forward_pass_id = 0
        self._wall_clock = wall_clock
        self._stepped = False
        self._compiling: WarmUp | None = None
        dispatches = host.dispatch is None
        self._dispatcher = ExpertDispatcher.from_config(config, metadata, communicator) if dispatches else None
        self.placement = LivePlacement(
            metadata, host.layer_ids, dispatcher=self._dispatcher, on_layers_committed=host.on_layers_committed
        )
        self._row_of = {layer_id: row for row, layer_id in enumerate(self.placement.layer_ids)}
        self.recorder = ExpertDistributionRecorder.from_config(
            config, metadata, communicator, num_windows=HISTORY, replicated=host.replicated_counts
        )
        self.failures = failures = FailureWatch(communicator)
        timer = RebalanceTimer(clock)
        if migration is not None:
            self._migration = migration(self.placement, failures)
        else:
            assert expert_weights is not None, "experts are moved by us or by the host's migration"
            self._migration = weight_migration(
                config, expert_weights, self.placement, communicator, transfer_communicator, failures
            )
        self._background: BackgroundPlanner[Plan] = BackgroundPlanner(communicator)
        planner = RebalancePlanner(
            config,
            self.placement,
            self.recorder,
            self._background,
            failures,
            timer,
            dispatch=dispatch,
            num_groups=host.num_groups,
            max_staged_experts=self._migration.max_staged_experts,
            clock=clock,
        )
        reporter = Reporter(
            self.placement, self._migration, timer, failures, host.on_report, profile=config.eplb_profile
        )
        self._rebalancing = Rebalancing(config, self.placement, planner, self._migration, failures, reporter, timer)
        self._handler = CommandHandler(
            config, self.placement, self.recorder, self._rebalancing, reporter, communicator, self._is_compiling
        )

    def warm_up(self) -> None:
        """Collective, before serving: opens the connection between every pair of ranks.

        Rank 0 also has its kernels compiled in a child process; a plan that is asked for meanwhile waits in its thread.
        """
        self._migration.warm_up()
        if self._rank == 0:
            self._compiling = compile_kernels_in_background(self._planned_dispatch)
            self._background.prepare(partial(load_compiled_kernels, self._compiling, self._planned_dispatch))

    @property
    def phase(self) -> Phase:
        """The same on all ranks, between ticks."""
        return self._rebalancing.phase

    @property
    def wants_tick(self) -> bool:
        """Work is pending that ticks carry on even when no request runs. The same on all ranks."""
        return self._rebalancing.wants_tick

    def begin_forward_pass(self, phase: StepPhase, *, num_decode_tokens: int = 0) -> None:
        """Says what the step to come holds; for hosts that tell phases (``HostTraits.tells_phases``).

        Args:
            phase: of all ranks' tokens together, so the same on all ranks.
            num_decode_tokens: in a mixed step, of this rank's tokens the first so many are decoded.
        """
        self.recorder.begin_step(phase, num_decode_tokens)

    def route(self, layer_id: int, topk_ids: torch.Tensor, rank_bounds: Sequence[int] | None = None) -> torch.Tensor:
        """Dispatches and counts this rank's tokens: (T, K) logical experts to (T, K) slots; -1 stays -1.

        ``layer_id`` is the host's number of the layer. With ``rank_bounds``, (G + 1), ``topk_ids`` holds all ranks'
        tokens in order: dispatch ``batch`` in scope ``node`` or ``all`` then needs no message.
        """
        assert self._dispatcher is not None, "this host dispatches itself"
        row = self._row_of[layer_id]
        slots = self._dispatcher.dispatch(row, topk_ids, rank_bounds=rank_bounds, counts=self.recorder.counts)
        self.recorder.record_routed(row, topk_ids, slots, rank_bounds)
        return slots

    def record_counts(self, physical_counts: torch.Tensor) -> None:
        """Adds what the host has counted in the forward pass under way, once or in parts.

        Args:
            physical_counts: (L, P) of any integer dtype, on the device of the maps: tokens of this rank in each slot;
                with ``layer_ids``, rows are the host's layers, dense ones included.

        Raises:
            LoadError: another shape.
        """
        self.recorder.record_counts(self.placement.rows_of_host(physical_counts))

    def end_forward_pass(self, *, counted: bool, num_tokens: int = 0) -> None:
        """Closes a step.

        Args:
            counted: False for warm-up and idle steps: they are not load. The same on all ranks.
            num_tokens: tokens of this rank, for the turns of replicas; of no meaning where the host dispatches.
        """
        with self.failures.guard("closing a step"):
            if self._dispatcher is not None:
                self._dispatcher.advance(num_tokens)
            live_map = self.placement.metadata.physical_to_logical_map
            self.recorder.end_step(live_map, forward_pass_id=self.forward_pass_id, counted=counted)
        self._rebalancing.end_step(counted=counted)
        self.forward_pass_id += 1
        self._stepped = True

    def tick(self) -> None:
        """Carries the phase machine on. Collective: every rank calls it after each step, and when idle if wanted.

        Raises nothing: what goes wrong on any rank is phase ``failed`` on all; the last committed placement serves on.
        """
        with torch.profiler.record_function("equipoise.tick"):
            self._rebalancing.tick(forward_pass_id=self.forward_pass_id, idle=not self._stepped)
        self._stepped = False

    def submit(self, command: Command[R]) -> PendingReply[R]:
        """Takes an operator's command. Collective: every rank submits the same ones in the same order."""
        return self._handler.submit(command, forward_pass_id=self.forward_pass_id, wall_clock=self._wall_clock())

    def pause(self, reason: str) -> None:
        """Collective. Returns once nothing moves; no rebalance begins until :meth:`resume`.

        For a host that takes the weights away or changes its ranks. One under way is cancelled; committed layers stand.
        """
        pending = self.submit(Pause(reason))
        while not pending.done and self.phase != "failed":
            self.tick()

    def resume(self) -> None:
        """Collective. Lets rebalances begin again."""
        self.submit(Resume())

    def weights_changed(self) -> None:
        """Collective, after the host has loaded weights anew and before the next tick.

        What is staged holds the old weights and is dropped: a rebalance under way ends as cancelled.
        """
        self._migration.weights_changed()

    def _is_compiling(self) -> bool:
        return self._compiling is not None and not (self._compiling.done or self._compiling.ready)

    def close(self) -> None:
        """Ends the threads."""
        if self._compiling is not None:
            self._compiling.cancel()
        self._handler.close()
        self._background.close()
        self._migration.close()
