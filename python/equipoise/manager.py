"""EplbManager: the loop of balancing as an explicit phase machine, driven once per forward pass by its host.

::

    collecting ──due or requested──> planning ──a placement worth moving to──> migrating ──last layer──> collecting
                                        └──────────────skip or dry run──────────────────────────────────────┘
    failed: the group of ranks is broken; the last committed placement serves on, nothing is rebalanced any more

Every rank has a manager and calls it alike. Planning runs on rank 0 in a thread, beside the forward passes; its result
is broadcast, so all ranks follow one plan. Layers commit between two forward passes, the same ones on all ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Protocol

import numpy as np
import torch

from equipoise.algorithms import available_algorithms, check_algorithm
from equipoise.commands import (
    Command,
    DumpRecording,
    GetExpertLocation,
    GetStatus,
    Phase,
    Rebalance,
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
from equipoise.manager_replies import (
    TransferTally,
    expert_location_reply,
    mean_or_none,
    rebalance_report,
    window_balancedness,
    write_dump,
)
from equipoise.metrics import rank_load
from equipoise.planning import MAX_WINDOWS, PlannedRebalance, plan_rebalance
from equipoise.recorder import ExpertDistributionRecorder
from equipoise.transfer_plan import LayerTransferPlan, TransferPlan, TransferStep, plan_transfer
from equipoise.updater import ExpertLocationUpdater

_IDLE_WAIT_SECONDS = 0.005
"""How long a tick without a forward pass waits for the planner, instead of spinning."""


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
        communicator: over the expert-parallel ranks. CPU tensors and objects must be able to travel on it.
        num_groups: groups of group-limited routing, if the model has it.
        clock: seconds, monotonic.
        wall_clock: seconds since the epoch, for file names.
    """

    def __init__(
        self,
        config: EplbConfig,
        adapter: EngineAdapter,
        metadata: ExpertLocationMetadata,
        communicator: Communicator,
        *,
        num_groups: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
        wall_clock: Callable[[], float] = time.time,
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
        self._dispatcher = ExpertDispatcher(metadata, rank=communicator.rank, algorithm=config.ep_dispatch_algorithm)
        self._window = self._new_recorder(keep_physical=False)
        self._window.start()
        self._recording = self._new_recorder(keep_physical=config.expert_distribution_recorder_mode == "per_pass")
        self._updater = ExpertLocationUpdater(
            communicator,
            metadata.topology,
            adapter.expert_weights(),
            verification=config.eplb_verification,
            staging_bytes=config.eplb_staging_bytes,
            timeout=config.eplb_transfer_timeout,
        )
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="eplb-planner")
        self._planning: Future[tuple[PlannedRebalance, TransferPlan | None]] | None = None
        self._request: Rebalance | None = None
        self._ticket: Ticket | None = None
        self._steps_since_rebalance = 0
        self._steps_to_wait = config.eplb_rebalance_num_iterations
        self._stepped = False
        self._planned: PlannedRebalance | None = None
        self._target: ExpertLocationMetadata | None = None
        self._transfer: TransferPlan | None = None
        self._pending: list[LayerTransferPlan] = []
        self._tally = TransferTally()

    # During a forward pass ------------------------------------------------------------------------------------------

    def route(self, layer_id: int, topk_ids: torch.Tensor) -> torch.Tensor:
        """Dispatches and counts a batch: (T, K) int64 logical experts to (T, K) int64 slots; -1 stays -1."""
        physical_ids = self._dispatcher.dispatch(layer_id, topk_ids)
        self._window.record(layer_id, physical_ids)
        self._recording.record(layer_id, physical_ids)
        return physical_ids

    def end_forward_pass(self, *, counted: bool, num_tokens: int) -> None:
        """Closes a step.

        Args:
            counted: False for warm-up and idle steps: they are not load. The same on all ranks.
            num_tokens: tokens of this rank, for the turns of replicas.
        """
        self._dispatcher.advance(num_tokens)
        p2l = self.metadata.physical_to_logical_map
        for recorder in (self._window, self._recording):
            recorder.end_step(p2l, forward_pass_id=self.forward_pass_id, counted=counted)
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
        if self.phase == "collecting" and (self._request is not None or self._due()):
            self._begin_planning()
        elif self.phase == "planning":
            self._poll_planning(idle)
        elif self.phase == "migrating":
            self._migrate_chunk()

    def submit(self, command: Command) -> Ticket:
        """Takes an operator's command. Collective: every rank submits the same ones in the same order."""
        ticket = Ticket()
        try:
            self._execute(command, ticket)
        except EquipoiseError as error:
            ticket.resolve(error)
        return ticket

    def close(self) -> None:
        """Ends the planner's thread."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _execute(self, command: Command, ticket: Ticket) -> None:
        if isinstance(command, Rebalance):
            self._accept(command, ticket)
        elif isinstance(command, StartRecording):
            self._recording.reset()
            self._recording.start()
            ticket.resolve(None)
        elif isinstance(command, StopRecording):
            if not self._recording.recording:
                raise PhaseError("no recording runs: start one first")
            self._recording.stop()
            ticket.resolve(None)
        elif isinstance(command, DumpRecording):
            if self._recording.num_steps == 0:
                raise PhaseError("nothing was recorded: start a recording and send requests first")
            snapshot = self._recording.snapshot(self._communicator)
            if self._communicator.rank == 0:
                ticket.resolve(write_dump(snapshot, self.metadata, command.directory, self._wall_clock()))
        elif isinstance(command, GetStatus):
            window = self._window.windows(self._communicator, num_windows=1, last=self._look_back(None))
            ticket.resolve(self._status(window))
        elif isinstance(command, GetExpertLocation):
            ticket.resolve(expert_location_reply(self.metadata))
        else:
            raise ConfigError(f"unknown command {command!r}", field="command")

    def _accept(self, request: Rebalance, ticket: Ticket) -> None:
        if self.phase == "failed":
            raise PhaseError(f"rebalancing has stopped: {self.error}")
        if self._request is not None or self.phase != "collecting":
            raise PhaseError(f"a rebalance is under way (phase {self.phase}, {len(self._pending)} layers to go)")
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
            recording=self._recording.recording,
            algorithm=self.config.eplb_algorithm,
            available_algorithms=available_algorithms(),
            forward_pass_id=self.forward_pass_id,
            window_steps=self._window_steps(None),
            mean_balancedness=mean_or_none(per_layer),
            balancedness=per_layer,
            rank_load=rank_load(window.sum(0), metadata).tolist() if len(window) else [],
            num_layers=metadata.num_layers,
            num_logical_experts=metadata.num_logical_experts,
            num_physical_experts=metadata.num_physical_experts,
            num_ranks=metadata.topology.num_ranks,
            num_nodes=metadata.topology.num_nodes,
            num_rebalances=self.num_rebalances,
            layers_pending=len(self._pending),
            last_report=self.last_report,
            error=self.error,
        )

    def _algorithm_of(self, request: Rebalance | None) -> str:
        return (request.algorithm if request else None) or self.config.eplb_algorithm

    def _due(self) -> bool:
        return self.config.enable_eplb and self._steps_since_rebalance >= self._steps_to_wait

    def _look_back(self, request: Rebalance | None) -> int:
        asked = request.window_steps if request else None
        return asked or self.config.eplb_rebalance_num_iterations

    def _window_steps(self, request: Rebalance | None) -> int:
        return min(self._look_back(request), self._window.num_steps)

    def _begin_planning(self) -> None:
        request = self._request
        windows = self._window.windows(
            self._communicator, num_windows=MAX_WINDOWS, last=self._look_back(request)
        ).numpy()
        self.phase = "planning"
        if self._communicator.rank != 0:
            return
        current = self.metadata.clone("cpu")
        window_steps = self._window_steps(request)

        def plan() -> tuple[PlannedRebalance, TransferPlan | None]:
            planned = plan_rebalance(
                windows,
                current,
                self.config,
                algorithm=self._algorithm_of(request),
                request=request,
                window_steps=window_steps,
                num_groups=self._num_groups,
                clock=self._clock,
            )
            moving = planned.decision.action == "migrate"
            return planned, plan_transfer(current, planned.placement(current), current.topology) if moving else None

        self._planning = self._executor.submit(plan)

    def _poll_planning(self, idle: bool) -> None:
        """One small broadcast per step while rank 0 plans: nothing yet, or the plan."""
        message: tuple[PlannedRebalance, TransferPlan | None] | str | None = None
        if self._planning is not None:
            if idle:
                self._wait_for_planner()
            if self._planning.done():
                failure = self._planning.exception()
                message = f"{type(failure).__name__}: {failure}" if failure else self._planning.result()
                self._planning = None
        message = self._communicator.broadcast_object(message, src=0)
        if isinstance(message, str):
            self._finish(None, error=f"planning failed: {message}")
        elif message is not None:
            self._adopt(*message)

    def _wait_for_planner(self) -> None:
        assert self._planning is not None
        try:
            self._planning.exception(timeout=_IDLE_WAIT_SECONDS)
        except TimeoutError:
            return

    def _adopt(self, planned: PlannedRebalance, transfer: TransferPlan | None) -> None:
        dry_run = self._request is not None and self._request.dry_run
        if planned.decision.action == "skip" or dry_run:
            self._finish(planned, error=planned.error)
            return
        target = planned.placement(self.metadata)
        # Layers whose experts stay where they are need no transfer: their new dispatch weights hold from now on.
        assert planned.diff is not None
        moving = planned.diff.layers
        self._commit_maps(target, [layer for layer in range(target.num_layers) if layer not in moving])
        if transfer is None:
            self._finish(planned)
            return
        self._planned, self._target, self._transfer = planned, target, transfer
        self._pending = list(transfer.layers)
        self._tally = TransferTally()
        self.phase = "migrating"
        try:
            self._updater.agree_on(transfer)
        except TransferError as error:
            self._finish(planned, error=f"{type(error).__name__}: {error}")

    def _migrate_chunk(self) -> None:
        """Moves the next layers; each commits on all ranks or on none."""
        count = self.config.eplb_rebalance_layers_per_chunk
        chunk, self._pending = self._pending[:count], self._pending[count:]
        start = self._clock()
        for layer in chunk:
            try:
                report = self._updater.migrate_layer(layer, on_commit=partial(self._commit_step, layer.layer_id))
            except TransferError as error:
                self._tally.add_seconds(self._clock() - start)
                self._finish(self._planned, error=f"{type(error).__name__}: {error}")
                return
            self._tally.add(report)
        self._tally.add_seconds(self._clock() - start)
        if not self._pending:
            self._finish(self._planned)

    def _commit_step(self, layer_id: int, step: TransferStep) -> None:
        """The weights of a layer have just changed on all ranks: its maps follow before anything else runs."""
        assert self._target is not None
        if np.array_equal(step.new_map, self._target.physical_to_logical_map[layer_id].numpy()):
            self._commit_maps(self._target, [layer_id])
        else:  # on the way there: a complete placement too, but not one that weights were solved for
            self.metadata.update_layer_(layer_id, step.new_map.copy())
            self._dispatcher.refresh([layer_id])

    def _commit_maps(self, target: ExpertLocationMetadata, layers: list[int]) -> None:
        self.metadata.update_layers_(target, layers)
        self._dispatcher.refresh(layers)

    def _finish(self, planned: PlannedRebalance | None, error: str | None = None) -> None:
        # After a failure a peer may be gone: nothing is gathered then.
        moved = self._transfer is not None and error is None
        ranks = self.metadata.topology.num_ranks
        bytes_ = self._tally.over_ranks(self._communicator) if moved else np.zeros((ranks, 4), dtype=np.int64)
        report = rebalance_report(
            self.metadata,
            planned,
            request=self._request,
            algorithm=self._algorithm_of(self._request),
            forward_pass_id=self.forward_pass_id,
            transfer_seconds=self._tally.seconds,
            per_rank_bytes=bytes_,
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
        self._request = self._ticket = self._planned = self._target = self._transfer = None
        self._pending, self._tally = [], TransferTally()
        self.phase = "failed" if self._updater.broken else "collecting"

    def _new_recorder(self, *, keep_physical: bool) -> ExpertDistributionRecorder:
        return ExpertDistributionRecorder(
            self.metadata.num_layers,
            self.metadata.num_physical_experts,
            self.metadata.num_logical_experts,
            buffer_size=self.config.expert_distribution_recorder_buffer_size,
            device=self.metadata.physical_to_logical_map.device,
            keep_physical=keep_physical,
        )
