"""Carries out what an operator asks of one rank."""

from __future__ import annotations

from equipoise.algorithms.registry import available_algorithms
from equipoise.config import EplbConfig
from equipoise.errors import ConfigError, EquipoiseError
from equipoise.manager.commands import (
    Command,
    DumpRecording,
    GetExpertLocation,
    GetStatus,
    Rebalance,
    StartRecording,
    StatusReply,
    StopRecording,
)
from equipoise.manager.phases import Rebalancing
from equipoise.manager.recording import LoadRecording
from equipoise.manager.replies import expert_location_reply, mean_or_none, window_balancedness
from equipoise.placement.balancedness import rank_load
from equipoise.placement.metadata import ExpertLocationMetadata


class Ticket:
    """The answer to a command: there at once, or when its work is done."""

    def __init__(self) -> None:
        self.done = False
        self.reply: object = None  # an EquipoiseError if the command failed

    def resolve(self, reply: object) -> None:
        self.reply, self.done = reply, True


class CommandDesk:
    """Answers from what a rank knows, and hands on what takes longer than one call.

    Args:
        metadata: the live placement.
        load: what is recorded.
        rebalancing: the rebalance under way, and the next one.
    """

    def __init__(
        self, config: EplbConfig, metadata: ExpertLocationMetadata, load: LoadRecording, rebalancing: Rebalancing
    ) -> None:
        self._config = config
        self._metadata = metadata
        self._load = load
        self._rebalancing = rebalancing

    def submit(self, command: Command, *, forward_pass_id: int, wall_clock: float) -> Ticket:
        """Takes a command. Collective: every rank takes the same ones in the same order.

        Args:
            forward_pass_id: of the step to come.
            wall_clock: seconds since the epoch.
        """
        ticket = Ticket()
        try:
            if isinstance(command, Rebalance):
                self._rebalancing.request(command, ticket.resolve)
            else:
                ticket.resolve(self._answer(command, forward_pass_id, wall_clock))
        except EquipoiseError as error:
            ticket.resolve(error)
        return ticket

    def _answer(self, command: Command, forward_pass_id: int, wall_clock: float) -> object:
        if isinstance(command, StartRecording):
            self._load.start()
            return None
        if isinstance(command, StopRecording):
            self._load.stop()
            return None
        if isinstance(command, DumpRecording):
            return self._load.dump(command.directory, wall_clock)
        if isinstance(command, GetStatus):
            return self._status(forward_pass_id)
        if isinstance(command, GetExpertLocation):
            return expert_location_reply(self._metadata)
        raise ConfigError(f"unknown command {command!r}", field="command")

    def _status(self, forward_pass_id: int) -> StatusReply:
        metadata, rebalancing = self._metadata, self._rebalancing
        window = self._load.windows(1)
        per_layer = window_balancedness(window, metadata)
        return StatusReply(
            phase=rebalancing.phase,
            enable_eplb=self._config.enable_eplb,
            recording=self._load.recording,
            algorithm=self._config.eplb_algorithm,
            available_algorithms=available_algorithms(),
            forward_pass_id=forward_pass_id,
            window_steps=self._load.window_steps(None),
            mean_balancedness=mean_or_none(per_layer),
            balancedness=per_layer,
            rank_load=rank_load(window.sum(0), metadata).tolist() if len(window) else [],
            num_layers=metadata.num_layers,
            num_logical_experts=metadata.num_logical_experts,
            num_physical_experts=metadata.num_physical_experts,
            num_ranks=metadata.topology.num_ranks,
            num_nodes=metadata.topology.num_nodes,
            num_rebalances=rebalancing.totals.by_outcome["committed"],
            totals=rebalancing.totals,
            layers_pending=rebalancing.layers_pending,
            last_report=rebalancing.last_report,
            error=rebalancing.error,
        )
