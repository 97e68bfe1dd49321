"""What an operator can ask of a running engine, and what comes back: plain frozen values that cross processes.

Every rank receives the same commands in the same order, between two forward passes, so that all of them take the
same decisions without talking. Rank 0's reply is the one that reaches the operator.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from equipoise.transfer.execution.profile import LayerProfile

Phase = Literal["collecting", "planning", "migrating", "failed"]
Action = Literal["skip", "reweight", "migrate"]
Outcome = Literal["skipped", "dry_run", "committed", "failed"]


@dataclass(frozen=True)
class StartRecording:
    """Begin a recording for a dump; an earlier one is dropped. Reply: None."""


@dataclass(frozen=True)
class StopRecording:
    """End the recording; what it holds can still be dumped. Reply: None. PhaseError if none runs."""


@dataclass(frozen=True)
class DumpRecording:
    """Write what was recorded, reduced over all ranks, to a new file in ``directory``. Reply: :class:`DumpReply`."""

    directory: str


@dataclass(frozen=True)
class Rebalance:
    """Plan from the load window of now and migrate. Reply, once the last layer has committed: RebalanceReport.

    PhaseError while another rebalance runs; ConfigError for an unknown algorithm.
    """

    algorithm: str | None = None  # None: the one the engine was started with
    dry_run: bool = False  # plan and report, change nothing
    max_moves_per_layer: int | None = None  # None: the engine's
    move_price: float | None = None  # None: the engine's
    window_steps: int | None = None  # plan from the last so many steps; None: --eplb-rebalance-num-iterations
    force: bool = False  # carry the plan out even if it gains nothing on the window it was made from


@dataclass(frozen=True)
class GetStatus:
    """Reply: :class:`StatusReply`."""


@dataclass(frozen=True)
class GetExpertLocation:
    """Reply: :class:`ExpertLocationReply`."""


@dataclass(frozen=True)
class GetSteps:
    """The last steps from forward pass ``since`` on. Reply: list[StepRecord], oldest first."""

    since: int = 0


@dataclass(frozen=True)
class GetStepTotals:
    """All steps in sums. Reply: list[StepTotals], one for each phase that a step has been in."""


Command = (
    StartRecording
    | StopRecording
    | DumpRecording
    | Rebalance
    | GetStatus
    | GetExpertLocation
    | GetSteps
    | GetStepTotals
)


@dataclass(frozen=True)
class DumpReply:
    path: str  # absolute
    num_steps: int
    num_tokens: int  # token-expert assignments of one layer, summed over steps; the largest layer


@dataclass(frozen=True)
class RebalanceProfile:
    """Where the time of a rebalance went, on rank 0."""

    gather_seconds: float  # load window, reduced over ranks
    plan_seconds: float  # the placement algorithm
    plan_transfer_seconds: float  # who sends what to whom
    wait_seconds: float  # from the start of planning until all ranks had the plan
    migrate_seconds: float  # from then until the last commit
    stall_seconds: float  # of all that, what stood between two forward passes
    peak_staging_bytes: int
    layers: list[LayerProfile]


@dataclass(frozen=True)
class RebalanceReport:
    """What one rebalance decided and did. Lists over layers are in layer order; None where a layer saw no token."""

    outcome: Outcome
    action: Action
    reason: str
    algorithm: str
    forward_pass_id: int  # the step after which it was decided
    window_steps: int
    balancedness_before: list[float | None]
    balancedness_after: list[float | None]  # of the same window on the new placement
    mean_balancedness_before: float | None
    mean_balancedness_after: float | None
    slots_changed: list[int]
    moves: list[int]
    cross_node_moves: list[int]
    bytes_sent_per_rank: list[int]  # over the wire, canaries included; of a failed one, for the layers that committed
    bytes_received_per_rank: list[int]
    bytes_sent_per_node: list[int]  # to another node
    bytes_received_per_node: list[int]  # from another node
    planning_seconds: float  # beside the forward passes
    transfer_seconds: float  # from the plan's arrival to the last commit
    stall_seconds: float  # time that forward passes waited for this rebalance, in all
    profile: RebalanceProfile
    error: str | None = None

    @property
    def bytes_moved(self) -> int:
        return sum(self.bytes_received_per_rank)


@dataclass(frozen=True)
class RebalanceTotals:
    """Sums over every rebalance that has ended since start, requested or not: they never fall."""

    by_outcome: dict[Outcome, int] = field(default_factory=lambda: dict.fromkeys(get_args(Outcome), 0))
    moves: int = 0  # of committed rebalances
    cross_node_moves: int = 0
    moved_bytes: int = 0  # for all layers that committed, those of rebalances that failed later included
    stall_seconds: float = 0.0

    def plus(self, report: RebalanceReport) -> RebalanceTotals:
        """These totals with one more rebalance."""
        committed = report.outcome == "committed"
        return RebalanceTotals(
            by_outcome={**self.by_outcome, report.outcome: self.by_outcome[report.outcome] + 1},
            moves=self.moves + committed * sum(report.moves),
            cross_node_moves=self.cross_node_moves + committed * sum(report.cross_node_moves),
            moved_bytes=self.moved_bytes + report.bytes_moved,
            stall_seconds=self.stall_seconds + report.stall_seconds,
        )


@dataclass(frozen=True)
class StatusReply:
    phase: Phase
    enable_eplb: bool
    recording: bool
    algorithm: str
    available_algorithms: list[str]
    forward_pass_id: int
    window_steps: int  # steps in the load window of now
    mean_balancedness: float | None  # of the load window on the present placement
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
    error: str | None  # why the phase is failed, or the last migration failed


@dataclass(frozen=True)
class ExpertLocationReply:
    num_ranks: int
    num_nodes: int
    slots_per_rank: int
    num_logical_experts: int
    physical_to_logical_map: list[list[int]]  # (L, P)
    dispatch_weights: list[list[float]]  # (L, P)


@dataclass(frozen=True)
class StepRecord:
    """One forward pass as rank 0 saw it."""

    forward_pass_id: int
    seconds: float  # forward pass and everything balancing added to it
    num_tokens: int
    phase: Phase


@dataclass(frozen=True)
class StepTotals:
    """Sums over every forward pass since start that was in one phase: they never fall."""

    phase: Phase
    num_tokens: int
    seconds: float
    durations: dict[float, int]  # steps of at most so many seconds, and of more than the bound before; the last is inf

    @property
    def num_steps(self) -> int:
        return sum(self.durations.values())
