"""Moves expert weights between ranks: stage, verify, vote, commit.

A batch of a plan is staged while the live weights serve on: what a rank receives lands in its staging area, never in a
live slot. Then the ranks vote. Only if all of them hold what the plan names does :meth:`ExpertLocationUpdater.commit`
bring it into the live slots, which is local and short: a copy, or where layers share their rows an exchange of rows. If
any rank failed, every rank raises the same kind of :class:`~equipoise.errors.TransferError` and no live byte has
changed on any of them.

Verification ``canary``: next to the weights of each layer lies one int64 per slot that names layer and expert. It is
set once, from the map of the first plan, and then moves only by the same messages and copies as the weights; it is
compared with the plan before anything is sent and again where it lands. ``checksum`` compares the content as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from equipoise.distributed.communicator import Communicator
from equipoise.errors import PlanMismatchError
from equipoise.topology import EpTopology
from equipoise.transfer.execution.faults import FaultInjector, NoFaults
from equipoise.transfer.execution.pipeline import SideStream, TransferPipeline
from equipoise.transfer.execution.profile import LayerTransferReport, experts_over_ranks
from equipoise.transfer.execution.vote import VOTE_GRACE_SECONDS, LayerVote
from equipoise.transfer.memory.store import ExpertStore, ExpertWeights
from equipoise.transfer.memory.verification import Verification, checksum
from equipoise.transfer.planning.rank_program import RankProgram, compile_program_kernels, rank_program
from equipoise.transfer.planning.types import LayerTransferPlan, TransferBatch, TransferPlan

ROUNDS_IN_FLIGHT = 4
"""Default, and with it the default number of staged experts."""


@dataclass(frozen=True, eq=False)
class StagedBatch:
    """A batch that all ranks hold and have verified; ready for :meth:`ExpertLocationUpdater.commit`."""

    layer_id: int
    batch: TransferBatch
    program: RankProgram
    report: LayerTransferReport


class ExpertLocationUpdater:
    """Executes transfer plans on one rank.

    Args:
        communicator: reaches the other ranks; nobody else uses its groups while a transfer runs.
        topology: where slots lie.
        expert_weights: ``[layer][i]``, the live tensors of this rank, each (slots_per_rank, ...) with contiguous rows,
            of any dtype; or the pool that all layers share. They are written by commits only.
        verification: see the module.
        staging_bytes: most bytes to allocate for staging; None: an expert of the largest layer per round in flight.
            A pool's staging are its spare rows, whatever this says.
        timeout: seconds that staging one batch may take.
        rounds_in_flight: rounds of which a rank may be in the middle; 1 keeps its link to one peer each way, more hide
            the latency between rounds. With a ``duty`` it is 1: what is under way moves on while the updater rests.
        duty: share of the time, in (0, 1], that may go to transfers; the rest of it the updater sleeps between rounds,
            so that forward passes beside it keep the processor and the links.
        vote_grace: seconds beyond ``timeout`` after which a vote is given up.
        faults: what goes wrong on purpose.
        clock: seconds, monotonic.
        sleep: for ``duty``.

    Raises:
        ConfigError: unusable weights, or a budget below one expert.
    """

    def __init__(
        self,
        communicator: Communicator,
        topology: EpTopology,
        expert_weights: ExpertWeights,
        *,
        verification: Verification = "canary",
        staging_bytes: int | None = None,
        timeout: float = 60.0,
        rounds_in_flight: int = ROUNDS_IN_FLIGHT,
        duty: float = 1.0,
        vote_grace: float = VOTE_GRACE_SECONDS,
        faults: FaultInjector | None = None,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._communicator = communicator
        self._topology = topology
        self._verification = verification
        self._timeout = timeout
        self._faults = faults if faults is not None else NoFaults()
        self._clock = clock
        self._store = ExpertStore(
            communicator.rank, topology, expert_weights, verification, staging_bytes, rounds_in_flight
        )
        self._vote = LayerVote(communicator, timeout + vote_grace, self._faults)
        self._stream = SideStream(self._store.memory.device)
        self._pipeline = TransferPipeline(
            communicator, self._store, self._stream, self._faults, rounds_in_flight, duty, clock=clock, sleep=sleep
        )

    @property
    def broken(self) -> str | None:
        """Why no further transfer can run before :meth:`recover`; None while one can."""
        return self._vote.broken

    @property
    def max_staged_experts(self) -> int:
        """Experts that fit into staging at once: what ``plan_transfer`` must be told."""
        return self._store.memory.capacity

    @property
    def staging_bytes(self) -> int:
        """Bytes allocated for staging now."""
        return self._store.memory.allocated_bytes

    def warm_up(self) -> None:
        """Collective. What is slow the first time: a byte between every pair of ranks, and compiled kernels."""
        compile_program_kernels()
        if self._verification == "checksum":
            checksum([torch.zeros(8, dtype=torch.uint8)])
        world_size, rank = self._communicator.world_size, self._communicator.rank
        sent = torch.zeros(1, dtype=torch.uint8, device=self._store.memory.device)
        landed = torch.zeros(1, dtype=torch.uint8, device=self._store.memory.device)
        for distance in range(1, world_size):
            to, frm = (rank + distance) % world_size, (rank - distance) % world_size
            self._communicator.exchange([(to, sent)], [(frm, landed)], self._timeout)
        self._communicator.barrier()

    def agree_on(self, plan: TransferPlan) -> None:
        """Collective, before the first byte moves.

        Raises:
            PlanMismatchError: on every rank, if any two hold plans with different digests.
        """
        digests = self._communicator.all_gather_object(plan.digest)
        if len(set(digests)) > 1:
            ranks = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
            raise PlanMismatchError(f"ranks {ranks} hold another transfer plan than rank 0; digests are {digests}")

    def migrate_layer(
        self, layer_plan: LayerTransferPlan, on_commit: Callable[[TransferBatch], None] | None = None
    ) -> LayerTransferReport:
        """Collective. Stages and commits all batches of a layer, one after the other.

        Args:
            layer_plan: the same on every rank.
            on_commit: called after each batch's commit: the maps must follow the weights now. Needed where a plan has
                several batches for a layer, since a failure in a later one leaves the layer at an earlier ``new_map``.

        Raises:
            TransferError: on every rank; the batch that failed changed nothing anywhere.
            InDoubtError: the vote broke off; see :meth:`recover`.
        """
        assert on_commit is not None or len(layer_plan.batches) == 1
        report: LayerTransferReport | None = None
        for batch in layer_plan.batches:
            cost = self.commit(self.stage(layer_plan.layer_id, batch))
            if on_commit is not None:
                on_commit(batch)
            report = cost if report is None else report + cost
        assert report is not None
        return report

    def stage(self, layer_id: int, batch: TransferBatch) -> StagedBatch:
        """Collective. Brings everything that the batch needs into staging, verifies it, and votes.

        Raises:
            TransferError: on every rank, if any of them failed; VerificationError if what arrived is not what was
                sent, TransferTimeout if a peer did not answer in time. Live weights are as they were.
            InDoubtError: the vote broke off. This rank may not commit before it knows that all others will too.
        """
        start = self._clock()
        program = rank_program(batch, self._communicator.rank, self._topology)
        failure: Exception | None = None
        transferred: float | None = None
        with self._stream.overlapped():
            try:
                # A rank whose live slots are not what the plan says still takes part: its peers wait for it.
                failure = self._store.check_live(layer_id, batch)
                self._store.memory.reserve(program.num_staging_slots)
                self._pipeline.run(layer_id, program, start + self._timeout)
                self._stream.finish()
                transferred = self._clock()
                self._verify(layer_id, program)
            except Exception as error:
                failure = failure or error
            failure = self._vote.cast(layer_id, failure)
        ended = self._clock()
        transferred = ended if transferred is None else transferred
        if failure is not None:
            raise failure
        report = LayerTransferReport(
            layer_id=layer_id,
            rank=self._communicator.rank,
            num_rounds=len(program.rounds),
            transfer_seconds=transferred - start,
            verify_seconds=ended - transferred,
            commit_seconds=0.0,
            peak_staging_bytes=self._store.memory.allocated_bytes,
            bytes_over_ranks=self._store.message_bytes(layer_id) * experts_over_ranks(batch, self._topology),
        )
        return StagedBatch(layer_id, batch, program, report)

    def commit(self, staged: StagedBatch) -> LayerTransferReport:
        """Brings a staged batch into the live slots of this rank. Local: no communication, no wait.

        The caller makes sure that no forward pass reads the layer meanwhile and that the maps change with it. An
        exception from here is not a TransferError: the others have committed, so this rank must stop.
        """
        start = self._clock()
        self._faults.at("commit", staged.layer_id)
        self._store.memory.commit(staged.layer_id, staged.program.copies)
        self._stream.committed()
        return replace(staged.report, commit_seconds=self._clock() - start)

    def recover(self) -> None:
        """Collective, after an InDoubtError on any rank, once none of them is inside a transfer: makes new groups.

        Raises:
            TransferError: there is no way to; :attr:`broken` says why.
        """
        self._vote.recover()

    def forget_canaries(self, layer_ids: Sequence[int]) -> None:
        """Takes the canaries of these layers from the next plan again: their weights were loaded anew by the host."""
        self._store.forget(layer_ids)

    def release_staging(self) -> None:
        """Gives staging memory back between two rebalances."""
        self._store.memory.release()

    def _verify(self, layer_id: int, program: RankProgram) -> None:
        fault = self._faults.at("verify", layer_id)
        if fault == "drop":
            self._store.wipe_staged(layer_id, program)
        elif fault == "corrupt":
            self._store.damage_staged(layer_id, program)
        self._store.check_staged(layer_id, program)
