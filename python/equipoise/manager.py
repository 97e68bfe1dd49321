"""EplbManager: the loop of balancing as an explicit phase machine, driven once per forward pass by its host.

::

    collecting ──due or requested──> planning ──a placement worth moving to──> migrating ──last layer──> collecting
                                        └──────────────skip or dry run──────────────────────────────────────┘
    failed: the group of ranks is broken; the last committed placement serves on, nothing is rebalanced any more

Every rank has a manager and calls it alike. Planning runs on rank 0 in a thread, beside the forward passes; its result
is broadcast, so all ranks follow one plan. Weights travel in a background thread too (mode ``async``) or between
forward passes (``chunked``, ``sync``). Layers commit between two forward passes, the same ones on all ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch

from equipoise.algorithms import WarmUp, available_algorithms, check_algorithm, warm_up_in_background
from equipoise.background_planner import BackgroundPlanner, PlanningFailed
from equipoise.commands import (
    Command,
    DumpRecording,
    GetExpertLocation,
    GetStatus,
    Phase,
    Rebalance,
    RebalanceProfile,
    RebalanceReport,
    StartRecording,
    StatusReply,
    StopRecording,
)
from equipoise.communicator import Communicator
from equipoise.config import EplbConfig
from equipoise.dispatch import ExpertDispatcher
from equipoise.errors import ConfigError, EquipoiseError, PhaseError, TransferError
from equipoise.expert_location import ExpertLocationMetadata
from equipoise.fault_injection import FaultInjector
from equipoise.kernels import compile_kernels
from equipoise.manager_replies import (
    expert_location_reply,
    mean_or_none,
    rebalance_report,
    window_balancedness,
)
from equipoise.metrics import rank_load
from equipoise.migration import Migration, MigrationBroken
from equipoise.planning import MAX_WINDOWS, PlannedRebalance, plan_rebalance
from equipoise.recording import LoadRecording
from equipoise.transfer_worker import InlineRunner, TransferWorker
from equipoise.updater import VOTE_GRACE_SECONDS, ExpertLocationUpdater

_STALL_SLACK_SECONDS = 30.0
"""Beyond all timeouts of a transfer step, before the watchdog says that its thread hangs."""


@dataclass
class _Stopwatch:
    """Where the time of the rebalance under way goes; seconds."""

    gather: float = 0.0
    started: float = 0.0
    planned: float = 0.0  # when the plan had reached all ranks
    stall: float = 0.0  # in ticks that have ended
    tick_began: float | None = None  # None: no forward pass waits for this tick

    def end_tick(self, now: float) -> None:
        if self.tick_began is not None:
            self.stall += now - self.tick_began
        self.tick_began = None


class EngineAdapter(Protocol):
    """What a host engine gives of itself."""

    def expert_weights(self) -> Sequence[Sequence[torch.Tensor]]:
        """The live expert weights of this rank.

        Returns:
            Per MoE layer, the tensors that make up its experts: each of shape (slots_per_rank, ...), any dtype, row
            ``i`` belonging to local slot ``i``. The manager writes into them between two forward passes.
        """
        ...


class Ticket:
    """The answer to a command: there at once, or when its work is done."""

    def __init__(self) -> None:
        self.done = False
        self.reply: object = None  # an EquipoiseError if the command failed

    def resolve(self, reply: object) -> None:
        self.reply, self.done = reply, True


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
        faults: what goes wrong on purpose while experts move.

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
        faults: FaultInjector | None = None,
    ) -> None:
        check_algorithm(config.eplb_algorithm, field="eplb_algorithm")
        self.config = config
        self.metadata = metadata
        self.phase: Phase = "collecting"
        self.forward_pass_id = 0
        self.num_rebalances = 0
        self.last_report: RebalanceReport | None = None
        self.error: str | None = None
        self._communicator = communicator
        self._num_groups = num_groups
        self._clock = clock
        self._wall_clock = wall_clock
        self._on_report = on_report
        self._dispatcher = ExpertDispatcher(metadata, rank=communicator.rank, algorithm=config.ep_dispatch_algorithm)
        self._load = LoadRecording(config, metadata, communicator)
        beside = config.eplb_transfer_mode == "async"
        if beside and transfer_communicator is None:
            raise ConfigError(
                "eplb_transfer_mode 'async' needs a transfer_communicator, with groups that nobody else uses",
                field="eplb_transfer_mode",
            )
        self._updater = ExpertLocationUpdater(
            transfer_communicator if transfer_communicator is not None else communicator,
            metadata.topology,
            adapter.expert_weights(),
            verification=config.eplb_verification,
            staging_bytes=config.eplb_staging_bytes,
            timeout=config.eplb_transfer_timeout,
            duty=config.eplb_transfer_duty if beside else 1.0,
            faults=faults,
        )
        stall_timeout = config.eplb_transfer_timeout + VOTE_GRACE_SECONDS + _STALL_SLACK_SECONDS
        self._runner = (
            TransferWorker(self._updater, stall_timeout=stall_timeout) if beside else InlineRunner(self._updater)
        )
        self._migration = Migration(
            metadata,
            self._dispatcher,
            communicator,
            self._runner,
            mode=config.eplb_transfer_mode,
            layers_per_chunk=config.eplb_rebalance_layers_per_chunk,
        )
        self._planner: BackgroundPlanner[PlannedRebalance] = BackgroundPlanner(communicator)
        self._plan: PlannedRebalance | None = None
        self._request: Rebalance | None = None
        self._ticket: Ticket | None = None
        self._steps_since_rebalance = 0
        self._steps_to_wait = config.eplb_rebalance_num_iterations
        self._stepped = False
        self._watch = _Stopwatch()
        self._compiling: WarmUp | None = None

    def warm_up(self) -> None:
        """Collective, before serving: opens the connection between every pair of ranks.

        Rank 0 also has its kernels compiled, in a child process, since a compiler in this one would hold up forward
        passes; a plan that is asked for meanwhile waits in the planner's thread.
        """
        self._updater.warm_up()
        if self._communicator.rank == 0:
            self._compiling = warm_up_in_background("equipoise.kernels")
            self._planner.prepare(partial(_await_kernels, self._compiling))

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
        self.forward_pass_id += 1
        self._steps_since_rebalance += counted
        self._stepped = True

    # Between two forward passes -------------------------------------------------------------------------------------

    @property
    def wants_tick(self) -> bool:
        """Work is pending that ticks carry on even when no request runs. The same on all ranks."""
        return self.phase in ("planning", "migrating") or self._request is not None

    def tick(self) -> None:
        """Carries the phase machine on. Collective: every rank calls it after each step, and when idle if wanted."""
        idle, self._stepped = not self._stepped, False
        self._watch.tick_began = None if idle else self._clock()
        if self.phase == "collecting" and (self._request is not None or self._due()):
            self._begin_planning()
        elif self.phase == "planning":
            self._poll_planning(idle)
        elif self.phase == "migrating":
            self._migrate(idle)
        self._watch.end_tick(self._clock())

    def submit(self, command: Command) -> Ticket:
        """Takes an operator's command. Collective: every rank submits the same ones in the same order."""
        ticket = Ticket()
        try:
            self._execute(command, ticket)
        except EquipoiseError as error:
            ticket.resolve(error)
        return ticket

    def close(self) -> None:
        """Ends the threads."""
        if self._compiling is not None:
            self._compiling.cancel()
        self._planner.close()
        self._runner.close()

    def _execute(self, command: Command, ticket: Ticket) -> None:
        if isinstance(command, Rebalance):
            self._accept(command, ticket)
        elif isinstance(command, StartRecording):
            self._load.start()
            ticket.resolve(None)
        elif isinstance(command, StopRecording):
            self._load.stop()
            ticket.resolve(None)
        elif isinstance(command, DumpRecording):
            ticket.resolve(self._load.dump(command.directory, self._wall_clock()))
        elif isinstance(command, GetStatus):
            ticket.resolve(self._status(self._load.windows(1)))
        elif isinstance(command, GetExpertLocation):
            ticket.resolve(expert_location_reply(self.metadata))
        else:
            raise ConfigError(f"unknown command {command!r}", field="command")

    def _accept(self, request: Rebalance, ticket: Ticket) -> None:
        if self.phase == "failed":
            raise PhaseError(f"rebalancing has stopped: {self.error}")
        if self._request is not None or self.phase != "collecting":
            pending = self._migration.layers_pending
            raise PhaseError(f"a rebalance is under way (phase {self.phase}, {pending} layers to go)")
        if request.algorithm is not None:
            check_algorithm(request.algorithm, field="algorithm")
        for name in ("max_moves_per_layer", "window_steps"):
            value, least = getattr(request, name), int(name == "window_steps")
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}", field=name)
        self._request, self._ticket = request, ticket

    def _status(self, window: torch.Tensor) -> StatusReply:
        metadata = self.metadata
        per_layer = window_balancedness(window, metadata)
        return StatusReply(
            phase=self.phase,
            enable_eplb=self.config.enable_eplb,
            recording=self._load.recording,
            algorithm=self.config.eplb_algorithm,
            available_algorithms=available_algorithms(),
            forward_pass_id=self.forward_pass_id,
            window_steps=self._load.window_steps(None),
            mean_balancedness=mean_or_none(per_layer),
            balancedness=per_layer,
            rank_load=rank_load(window.sum(0), metadata).tolist() if len(window) else [],
            num_layers=metadata.num_layers,
            num_logical_experts=metadata.num_logical_experts,
            num_physical_experts=metadata.num_physical_experts,
            num_ranks=metadata.topology.num_ranks,
            num_nodes=metadata.topology.num_nodes,
            num_rebalances=self.num_rebalances,
            layers_pending=self._migration.layers_pending,
            last_report=self.last_report,
            error=self.error,
        )

    def _algorithm_of(self, request: Rebalance | None) -> str:
        return (request.algorithm if request else None) or self.config.eplb_algorithm

    def _due(self) -> bool:
        return self.config.enable_eplb and self._steps_since_rebalance >= self._steps_to_wait

    def _begin_planning(self) -> None:
        self._watch = _Stopwatch(started=self._clock(), tick_began=self._watch.tick_began)
        request = self._request
        asked = request.window_steps if request is not None else None
        windows = self._load.windows(MAX_WINDOWS, asked)
        self._watch.gather = self._clock() - self._watch.started
        job = partial(
            plan_rebalance,
            windows.numpy(),
            self.metadata.clone("cpu"),
            self.config,
            algorithm=self._algorithm_of(request),
            request=request,
            window_steps=self._load.window_steps(asked),
            num_groups=self._num_groups,
            max_staged_experts=self._updater.max_staged_experts,
            clock=self._clock,
        )
        self._planner.start(job)
        self.phase = "planning"

    def _poll_planning(self, idle: bool) -> None:
        try:
            plan = self._planner.poll(idle=idle)
        except PlanningFailed as failure:
            self._finish(None, error=f"planning failed: {failure}")
            return
        if plan is None:
            return
        self._watch.planned = self._clock()
        dry_run = self._request is not None and self._request.dry_run
        if plan.decision.action == "skip" or dry_run:
            self._finish(plan, error=plan.error)
            return
        self._plan = plan
        self._migration.begin(plan.placement(self.metadata), plan.transfer)
        self.phase = "migrating"

    def _migrate(self, idle: bool) -> None:
        try:
            arrived = self._migration.advance(idle=idle)
        except TransferError as error:
            self._finish(
                self._plan,
                error=f"{type(error).__name__}: {error}",
                broken=isinstance(error, MigrationBroken),
            )
            return
        if arrived:
            self._finish(self._plan)

    def _finish(self, plan: PlannedRebalance | None, error: str | None = None, broken: bool = False) -> None:
        # After a failure a peer may be gone: nothing is gathered then.
        moved = self.phase == "migrating" and error is None
        per_rank = self._migration.bytes_over_ranks() if moved else np.zeros((self._communicator.world_size, 4), int)
        report = rebalance_report(
            self.metadata,
            plan,
            request=self._request,
            algorithm=self._algorithm_of(self._request),
            forward_pass_id=self.forward_pass_id,
            profile=self._profile(plan),
            per_rank_bytes=per_rank,
            error=error,
        )
        self.last_report, self.error = report, error
        self.num_rebalances += report.outcome == "committed"
        if self._ticket is not None:
            self._ticket.resolve(report)
        # After a failure the next try of our own waits twice as long as the last one did.
        iterations = self.config.eplb_rebalance_num_iterations
        self._steps_to_wait = min(2 * self._steps_to_wait, 64 * iterations) if error else iterations
        self._steps_since_rebalance = 0
        self._request = self._ticket = self._plan = None
        self.phase = "failed" if broken else "collecting"
        if self._on_report is not None:
            self._on_report(report)

    def _profile(self, plan: PlannedRebalance | None) -> RebalanceProfile:
        now, watch = self._clock(), self._watch
        watch.end_tick(now)
        migrating = self.phase == "migrating"
        return RebalanceProfile(
            gather_seconds=watch.gather,
            plan_seconds=plan.seconds if plan is not None else 0.0,
            plan_transfer_seconds=plan.transfer_seconds if plan is not None else 0.0,
            wait_seconds=(watch.planned or now) - watch.started,
            migrate_seconds=now - watch.planned if migrating else 0.0,
            stall_seconds=watch.stall,
            peak_staging_bytes=self._migration.peak_staging_bytes if migrating else 0,
            layers=list(self._migration.profiles) if migrating else [],
        )


def _await_kernels(compiling: WarmUp) -> None:
    """In the planner's thread: what the child process has compiled is loaded, not compiled again."""
    if compiling.wait():
        compile_kernels()
