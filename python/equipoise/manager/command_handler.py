"""CommandHandler: carries out what an operator asks of one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

from equipoise.algorithms.registry import available_algorithms
from equipoise.config import EplbConfig
from equipoise.distributed.communicator import Communicator
from equipoise.errors import ConfigError, EquipoiseError
from equipoise.load.operator_recording import OperatorRecording
from equipoise.load.recorder import ExpertDistributionRecorder
from equipoise.load.recording import write_dump
from equipoise.manager.commands import (
    Command,
    DumpRecording,
    DumpReply,
    ExpertLocationReply,
    GetExpertLocation,
    GetRecording,
    GetStatus,
    Pause,
    Rebalance,
    Resume,
    StartRecording,
    StatusReply,
    StopRecording,
)
from equipoise.manager.failures import rank_logger
from equipoise.manager.live_placement import LivePlacement
from equipoise.manager.phases import Rebalancing
from equipoise.manager.reporting import Reporter
from equipoise.manager.reports import as_optional_floats, mean_of, summarize_balance
from equipoise.placement.balancedness import balancedness, rank_load
from equipoise.placement.metadata import ExpertLocationMetadata

R = TypeVar("R")


class PendingReply(Generic[R]):
    """The answer to a command: there at once, or when its work is done."""

    def __init__(self) -> None:
        self.done = False
        self.reply: R | EquipoiseError | None = None  # an EquipoiseError if the command failed

    def resolve(self, reply: R | EquipoiseError) -> None:
        self.reply, self.done = reply, True

    def result(self) -> R:
        """The reply of a command that is done.

        Raises:
            EquipoiseError: the command failed.
        """
        assert self.done
        if isinstance(self.reply, EquipoiseError):
            raise self.reply
        return self.reply  # type: ignore[return-value]


class CommandHandler:
    """Answers from what a rank knows, and hands on what takes longer than one call.

    Args:
        placement: the live one.
        recorder: what is recorded.
        rebalancing: the rebalance under way, and the next one.
        reporter: those that have ended.
        communicator: of the serving thread.
        is_compiling: whether kernels are being compiled.
    """

    def __init__(
        self,
        config: EplbConfig,
        placement: LivePlacement,
        recorder: ExpertDistributionRecorder,
        rebalancing: Rebalancing,
        reporter: Reporter,
        communicator: Communicator,
        is_compiling: Callable[[], bool],
    ) -> None:
        self._config = config
        self._placement = placement
        self._recorder = recorder
        self._rebalancing = rebalancing
        self._reporter = reporter
        self._recording = OperatorRecording(config, recorder, placement.metadata, placement.layer_ids, communicator)
        self._rank = communicator.rank
        self._is_compiling = is_compiling

    def submit(self, command: Command[R], *, forward_pass_id: int, wall_clock: float) -> PendingReply[R]:
        """Takes a command. Collective: every rank takes the same ones in the same order.

        Args:
            forward_pass_id: of the step to come.
            wall_clock: seconds since the epoch.
        """
        pending: PendingReply[Any] = PendingReply()
        try:
            match command:
                case Rebalance():
                    self._rebalancing.request(command, pending.resolve)
                case Pause():
                    self._rebalancing.pause(command.reason, lambda: pending.resolve(None))
                case _:
                    pending.resolve(self._answer(command, forward_pass_id, wall_clock))
        except EquipoiseError as error:
            pending.resolve(error)
        except Exception as error:  # an operator's question must not end the host
            rank_logger(self._rank).exception("%r failed", command)
            pending.resolve(EquipoiseError(f"an error inside Equipoise: {type(error).__name__}: {error}"))
        return pending

    def close(self) -> None:
        """Ends the threads."""
        self._recording.close()

    def _answer(self, command: Command[Any], forward_pass_id: int, wall_clock: float) -> object:
        match command:
            case StartRecording():
                return self._recording.start(command.stream, command.directory, command.name)
            case StopRecording():
                return self._recording.stop()
            case GetRecording():
                return self._recording.describe()
            case DumpRecording():
                return self._dump(command.directory, wall_clock)
            case Resume():
                self._rebalancing.resume()
                return None
            case GetStatus():
                return self._status(forward_pass_id)
            case GetExpertLocation():
                return expert_location_reply(self._placement)
        raise ConfigError(f"unknown command {command!r}", field="command")

    def _dump(self, directory: str, wall_clock: float) -> DumpReply | None:
        snapshot = self._recording.snapshot()
        if self._rank != 0:
            return None
        path = write_dump(snapshot, self._placement.committed, self._placement.layer_ids, directory, wall_clock)
        tokens = int(snapshot.logical_count.sum((0, 2)).max())
        return DumpReply(str(path), len(snapshot.forward_pass_ids), tokens)

    def _status(self, forward_pass_id: int) -> StatusReply:
        committed, rebalancing = self._placement.committed, self._rebalancing
        window = self._recorder.windows(1)
        per_layer = window_balancedness(window, committed)
        load = rank_load(window.sum(0), committed)
        return StatusReply(
            phase=rebalancing.phase,
            enable_eplb=self._config.enable_eplb,
            recording=self._recording.running,
            compiling=self._is_compiling(),
            algorithm=self._config.eplb_algorithm,
            available_algorithms=available_algorithms(),
            forward_pass_id=forward_pass_id,
            load_phase=self._config.eplb_load_phase,
            window_steps=self._recorder.window_steps(),
            layer_ids=self._placement.layer_ids,
            mean_balancedness=mean_of(per_layer),
            balance=summarize_balance(load, self._placement.layer_ids),
            balancedness=per_layer,
            rank_load=load.tolist() if len(window) else [],
            num_layers=committed.num_layers,
            num_logical_experts=committed.num_logical_experts,
            num_physical_experts=committed.num_physical_experts,
            num_ranks=committed.topology.num_ranks,
            num_nodes=committed.topology.num_nodes,
            num_rebalances=self._reporter.totals.by_outcome["committed"],
            totals=self._reporter.totals,
            layers_pending=rebalancing.layers_pending,
            last_report=self._reporter.last_report,
            error=rebalancing.error,
        )


def window_balancedness(window: torch.Tensor, metadata: ExpertLocationMetadata) -> list[float | None]:
    """Per layer, of a (W, L, E) window on a placement; None for layers that saw no token, or W = 0."""
    if not len(window):
        return [None] * metadata.num_layers
    return as_optional_floats(balancedness(window.sum(0), metadata).numpy())


def expert_location_reply(placement: LivePlacement) -> ExpertLocationReply:
    committed = placement.committed
    return ExpertLocationReply(
        num_ranks=committed.topology.num_ranks,
        num_nodes=committed.topology.num_nodes,
        slots_per_rank=committed.topology.slots_per_rank,
        num_logical_experts=committed.num_logical_experts,
        layer_ids=placement.layer_ids,
        physical_to_logical_map=committed.physical_to_logical_map.tolist(),
        dispatch_weights=committed.dispatch_weights.tolist(),
    )
