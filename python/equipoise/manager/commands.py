"""Commands to a running engine and their replies: plain frozen values that cross processes.

Every rank receives the same commands in the same order, between two forward passes, so that all of them take the
same decisions without talking. Rank 0's reply is the one that reaches the operator.

A command's base class names its reply: ``Rebalance`` is a ``Command[RebalanceReport]``, so
``manager.submit(Rebalance())`` is a ``PendingReply[RebalanceReport]``. A host derives commands of its own from
:class:`Command` and answers them itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from equipoise.config import LoadPhase, StreamMode
from equipoise.load.stream_report import RecordingReply
from equipoise.manager.reports import BalanceSummary, Phase, RebalanceReport, RebalanceTotals

R = TypeVar("R")


class Command(Generic[R]):
    """Something that an operator asks for; its reply has the type ``R``."""


@dataclass(frozen=True)
class DumpReply:
    path: str  # absolute
    num_steps: int
    num_tokens: int  # token-expert assignments of one layer, summed over steps; the largest layer


@dataclass(frozen=True)
class StartRecording(Command[RecordingReply]):
    """Begin a recording. One for a dump that was there is dropped; a streamed one that runs is stopped.

    With ``stream``, steps go to files in a new folder ``name`` of ``directory`` as they come, a file for each rank.
    """

    stream: StreamMode | None = None  # None: keep the last steps in memory, for a dump
    directory: str = "."
    name: str = ""


@dataclass(frozen=True)
class StopRecording(Command[RecordingReply]):
    """End the recording; what it holds can still be dumped. PhaseError if none runs.

    A streamed one is written to its end meanwhile: ask with :class:`GetRecording` until it is finished.
    """


@dataclass(frozen=True)
class GetRecording(Command[RecordingReply]):
    """Ask whether a recording runs, and what a streamed one has written and dropped."""


@dataclass(frozen=True)
class DumpRecording(Command[DumpReply | None]):
    """Write what was recorded, reduced over all ranks, to a new file in ``directory``. Rank 0 replies.

    PhaseError if nothing was recorded, or it was streamed.
    """

    directory: str


@dataclass(frozen=True)
class Rebalance(Command[RebalanceReport]):
    """Plan from the load window of now and migrate. The reply comes once the last layer has committed.

    PhaseError while another rebalance runs or balancing is paused; ConfigError for an unknown algorithm.
    """

    algorithm: str | None = None  # None: the one the engine was started with
    dry_run: bool = False  # plan and report, change nothing
    max_moves_per_layer: int | None = None  # None: the engine's
    move_price: float | None = None  # None: the engine's
    window_steps: int | None = None  # plan from the last so many steps; None: --eplb-rebalance-num-iterations
    force: bool = False  # carry the plan out even if it gains nothing on the window it was made from


@dataclass(frozen=True)
class Pause(Command[None]):
    """Begin no rebalance until Resume; one under way is cancelled. The reply comes once nothing moves any more."""

    reason: str = "an operator asked for it"


@dataclass(frozen=True)
class Resume(Command[None]):
    """Take up rebalancing again; nothing happens where it is not paused."""


@dataclass(frozen=True)
class StatusReply:
    phase: Phase
    enable_eplb: bool
    recording: bool
    compiling: bool  # kernels are being compiled: a plan that is asked for waits for them
    algorithm: str
    available_algorithms: list[str]
    forward_pass_id: int
    load_phase: LoadPhase  # whose tokens the load window takes
    window_steps: int  # steps in the load window of now
    layer_ids: list[int]  # the host's numbers of the MoE layers; lists over layers are in this order
    mean_balancedness: float | None  # of the load window on the present placement
    balance: BalanceSummary | None  # the same in more figures; None if no layer saw a token
    balancedness: list[float | None]
    rank_load: list[list[float]]  # (L, G) tokens of the load window per rank; empty if nothing was recorded
    num_layers: int
    num_logical_experts: int
    num_physical_experts: int
    num_ranks: int
    num_nodes: int
    num_rebalances: int  # committed since start
    layers_pending: int
    totals: RebalanceTotals
    last_report: RebalanceReport | None
    error: str | None  # why the phase is failed or paused, or why the last rebalance failed


@dataclass(frozen=True)
class GetStatus(Command[StatusReply]):
    """Ask for phase, balance and the last rebalance."""


@dataclass(frozen=True)
class ExpertLocationReply:
    num_ranks: int
    num_nodes: int
    slots_per_rank: int
    num_logical_experts: int
    layer_ids: list[int]  # the host's numbers of the MoE layers: rows of the lists below
    physical_to_logical_map: list[list[int]]  # (L, P)
    dispatch_weights: list[list[float]]  # (L, P)


@dataclass(frozen=True)
class GetExpertLocation(Command[ExpertLocationReply]):
    """Ask for the live placement."""
