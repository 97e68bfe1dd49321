"""EplbManager: the loop of balancing, driven once per forward pass by its host.

::

    route             a router's choice becomes slots, and is counted          dispatch.py, recording.py
    end_forward_pass  closes the step
    tick              carries a rebalance on: collect, plan, migrate           rebalancing.py
    submit            takes an operator's command                              manager_commands.py

Every rank has a manager and calls it alike. Planning runs on rank 0 in a thread, beside the forward passes; its result
is broadcast, so all ranks follow one plan. Weights travel in a background thread too (mode ``async``) or between
forward passes (``chunked``, ``sync``). Layers commit between two forward passes, the same ones on all ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

from equipoise.algorithms.registry import check_algorithm
from equipoise.config import EplbConfig
from equipoise.dispatch.dispatcher import ExpertDispatcher
from equipoise.distributed.communicator import Communicator
from equipoise.errors import ConfigError
from equipoise.jit.warming import WarmUp
from equipoise.manager.background_planner import BackgroundPlanner
from equipoise.manager.command_handler import CommandDesk, Ticket
from equipoise.manager.commands import Command, Phase, RebalanceReport
from equipoise.manager.migration import Migration
from equipoise.manager.phases import Rebalancing
from equipoise.manager.planning import PlannedRebalance
from equipoise.manager.recording import LoadRecording
from equipoise.manager.warm_up import compile_kernels_in_background, load_compiled_kernels
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.transfer.execution.runner import InlineRunner
from equipoise.transfer.execution.updater import ExpertLocationUpdater
from equipoise.transfer.execution.vote import VOTE_GRACE_SECONDS
from equipoise.transfer.execution.worker import TransferWorker
from equipoise.transfer.memory.store import ExpertWeights

__all__ = ["EngineAdapter", "EplbManager", "Ticket"]

_STALL_SLACK_SECONDS = 30.0
"""Beyond all timeouts of a transfer step, before the watchdog says that its thread hangs."""


class EngineAdapter(Protocol):
    """What a host engine gives of itself."""

    def expert_weights(self) -> ExpertWeights:
        """The live expert weights of this rank.

        Returns:
            Per MoE layer, the tensors that make up its experts: each of shape (slots_per_rank, ...), any dtype, row
            ``i`` belonging to local slot ``i``. The manager writes into them between two forward passes. Or, where
            forward passes look up the row of a slot, an ``ExpertPool``: nothing is copied
            between two forward passes then.
        """
        ...


class EplbManager:
    """Balancing for one rank.

    Args:
        config: options; ``enable_eplb`` switches the periodic rebalance on, requested ones work without.
        adapter: the host.
        metadata: the live placement, changed in place; built with ``max_replicas = R + 1``.
        communicator: over the expert-parallel ranks, for the serving thread. CPU tensors and objects must be able to
            travel on it.
        transfer_communicator: over the same ranks with groups of its own, for the experts on their way; needed in
            mode ``async``, ``communicator`` if None otherwise.
        num_groups: groups of group-limited routing, if the model has it.
        clock: seconds, monotonic.
        wall_clock: seconds since the epoch, for file names.
        on_report: told of every rebalance that ends, requested or not, on every rank.

    Raises:
        ConfigError: an unknown algorithm, weights or budgets that cannot be used, no communicator for mode ``async``.
    """

    def __init__(
        self,
        config: EplbConfig,
        adapter: EngineAdapter,
        metadata: ExpertLocationMetadata,
        communicator: Communicator,
        *,
        transfer_communicator: Communicator | None = None,
        num_groups: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
        wall_clock: Callable[[], float] = time.time,
        on_report: Callable[[RebalanceReport], None] | None = None,
    ) -> None:
        check_algorithm(config.eplb_algorithm, field="eplb_algorithm")
        beside = config.eplb_transfer_mode == "async"
        if beside and transfer_communicator is None:
            raise ConfigError(
                "eplb_transfer_mode 'async' needs a transfer_communicator, with groups that nobody else uses",
                field="eplb_transfer_mode",
            )
        self.config = config
        self.metadata = metadata
        self.forward_pass_id = 0
        self._wall_clock = wall_clock
        self._rank = communicator.rank
        self._stepped = False
        self._compiling: WarmUp | None = None
        self._dispatcher = ExpertDispatcher(metadata, rank=communicator.rank, algorithm=config.ep_dispatch_algorithm)
        self._load = LoadRecording(config, metadata, communicator)
        self._updater = ExpertLocationUpdater(
            transfer_communicator if transfer_communicator is not None else communicator,
            metadata.topology,
            adapter.expert_weights(),
            verification=config.eplb_verification,
            staging_bytes=config.eplb_staging_bytes,
            timeout=config.eplb_transfer_timeout,
            duty=config.eplb_transfer_duty if beside else 1.0,
        )
        stall_timeout = config.eplb_transfer_timeout + VOTE_GRACE_SECONDS + _STALL_SLACK_SECONDS
        self._runner = (
            TransferWorker(self._updater, stall_timeout=stall_timeout) if beside else InlineRunner(self._updater)
        )
        self._planner: BackgroundPlanner[PlannedRebalance] = BackgroundPlanner(communicator)
        migration = Migration(
            metadata,
            self._dispatcher,
            communicator,
            self._runner,
            mode=config.eplb_transfer_mode,
            layers_per_chunk=config.eplb_rebalance_layers_per_chunk,
        )
        self._rebalancing = Rebalancing(
            config,
            metadata,
            self._load,
            self._planner,
            migration,
            max_staged_experts=self._updater.max_staged_experts,
            num_groups=num_groups,
            clock=clock,
            on_report=on_report,
        )
        self._desk = CommandDesk(config, metadata, self._load, self._rebalancing)

    def warm_up(self) -> None:
        """Collective, before serving: opens the connection between every pair of ranks.

        Rank 0 also has its kernels compiled, in a child process, since a compiler in this one would hold up forward
        passes; a plan that is asked for meanwhile waits in the planner's thread.
        """
        self._updater.warm_up()
        if self._rank == 0:
            self._compiling = compile_kernels_in_background()
            self._planner.prepare(partial(load_compiled_kernels, self._compiling))

    # What there is to see -------------------------------------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        """The same on all ranks, between ticks."""
        return self._rebalancing.phase

    @property
    def num_rebalances(self) -> int:
        """Committed since start."""
        return self._rebalancing.totals.by_outcome["committed"]

    @property
    def last_report(self) -> RebalanceReport | None:
        """Of the last rebalance that ended."""
        return self._rebalancing.last_report

    @property
    def error(self) -> str | None:
        """Why the phase is failed, or why the last rebalance failed."""
        return self._rebalancing.error

    @property
    def wants_tick(self) -> bool:
        """Work is pending that ticks carry on even when no request runs. The same on all ranks."""
        return self._rebalancing.wants_tick

    # During a forward pass ------------------------------------------------------------------------------------------

    def route(self, layer_id: int, topk_ids: torch.Tensor) -> torch.Tensor:
        """Dispatches and counts a batch: (T, K) int64 logical experts to (T, K) int64 slots; -1 stays -1."""
        physical_ids = self._dispatcher.dispatch(layer_id, topk_ids)
        self._load.record(layer_id, physical_ids)
        return physical_ids

    def end_forward_pass(self, *, counted: bool, num_tokens: int) -> None:
        """Closes a step.

        Args:
            counted: False for warm-up and idle steps: they are not load. The same on all ranks.
            num_tokens: tokens of this rank, for the turns of replicas.
        """
        self._dispatcher.advance(num_tokens)
        self._load.end_step(forward_pass_id=self.forward_pass_id, counted=counted)
        self._rebalancing.end_step(counted=counted)
        self.forward_pass_id += 1
        self._stepped = True

    # Between two forward passes -------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Carries the phase machine on. Collective: every rank calls it after each step, and when idle if wanted."""
        idle, self._stepped = not self._stepped, False
        self._rebalancing.tick(forward_pass_id=self.forward_pass_id, idle=idle)

    def submit(self, command: Command) -> Ticket:
        """Takes an operator's command. Collective: every rank submits the same ones in the same order."""
        return self._desk.submit(command, forward_pass_id=self.forward_pass_id, wall_clock=self._wall_clock())

    def close(self) -> None:
        """Ends the threads."""
        if self._compiling is not None:
            self._compiling.cancel()
        self._planner.close()
        self._runner.close()
