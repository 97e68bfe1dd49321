"""Moves expert weights between ranks: stage, verify, vote, commit.

A batch of a plan is staged while the live weights serve on: what a rank receives lands in its staging area, never in a
live slot. Then the ranks vote. Only if all of them hold what the plan names does :meth:`ExpertLocationUpdater.commit`
bring it into the live slots, which is local and short: a copy, or where layers share their rows an exchange of rows. If
any rank failed, every rank raises the same kind of :class:`~equipoise.errors.TransferError` and no live byte has
changed on any of them; the room's docstring has a table of all that can fail.

Verification ``canary``: next to the weights of each layer lies one int64 per slot that names layer and expert. It is
set once, from the map of the first plan, and then moves only by the same messages and copies as the weights; it is
compared with the plan before anything is sent and again where it lands. ``checksum`` compares the content as well.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch.profiler import record_function

from equipoise.config import Verification
from equipoise.distributed.communicator import Communicator
from equipoise.errors import PlanMismatchError
from equipoise.topology import EpTopology
from equipoise.transfer.execution.pipeline import TransferPipeline
from equipoise.transfer.execution.profile import LayerProfile
from equipoise.transfer.execution.stream import CommitTimer, SideStream
from equipoise.transfer.execution.vote import VOTE_GRACE_SECONDS, LayerVote
from equipoise.transfer.memory.store import ExpertStore, ExpertWeights
from equipoise.transfer.planning.rank_program import RankProgram, compile_program_kernels, rank_program
from equipoise.transfer.planning.types import TransferBatch, TransferPlan

logger = logging.getLogger("equipoise.transfer")

ROUNDS_IN_FLIGHT = 4
"""Default, and with it the default number of staged experts."""
_STREAM_ROUNDS_IN_FLIGHT = 16
"""Where a device orders the rounds by itself: waiting for each costs more than the wire does (NCCL polls each 1 ms)."""


@dataclass(frozen=True, eq=False)
class StagedBatch:
    """A batch that all ranks hold and have verified; ready for :meth:`ExpertLocationUpdater.commit`."""

    layer_id: int
    batch: TransferBatch
    program: RankProgram
    profile: LayerProfile


@dataclass(frozen=True, eq=False)
class CommittedBatch:
    """A batch that was committed; on a GPU the commit may still be queued."""

    staged: StagedBatch
    timer: CommitTimer

    @property
    def profile(self) -> LayerProfile:
        """What it cost, as far as the device has come."""
        return replace(self.staged.profile, commit_seconds=self.timer.seconds())


class ExpertLocationUpdater:
    """Executes transfer plans on one rank.

    Args:
        communicator: reaches the other ranks; nobody else uses its groups while a transfer runs.
        topology: where slots lie.
        expert_weights: ``[layer][i]``, the live tensors of this rank, each (slots_per_rank, ...) with contiguous rows,
            of any dtype, or a list of one contiguous tensor per slot; or the pool that all layers share; or an
            ``ExpertMemory`` of the host's own. They are written by commits only.
        verification: see the module.
        staging_bytes: most bytes to allocate for staging; None: an expert of the largest layer per round in flight.
            A pool's staging are its spare rows, whatever this says.
        timeout: seconds that staging one batch may take.
        rounds_in_flight: rounds of which a rank may be in the middle; 1 keeps its link to one peer each way, more hide
            the latency between rounds. With a ``duty`` it is 1: what is under way moves on while the updater rests.
        duty: duty cycle, the share of the time in (0, 1] that may go to transfers; the rest of it the updater sleeps
            between rounds, so that forward passes beside it keep the processor and the links.
        vote_grace: seconds beyond ``timeout`` after which a vote is given up.
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
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._communicator = communicator
        self._topology = topology
        self._timeout = timeout
        self._clock = clock
        in_flight = max(rounds_in_flight, _STREAM_ROUNDS_IN_FLIGHT) if communicator.knows_streams else rounds_in_flight
        self._store = ExpertStore(
            communicator.rank,
            topology,
            expert_weights,
            verification,
            staging_bytes,
            default_staged=rounds_in_flight,
            num_send_buffers=in_flight,
        )
        self._vote = LayerVote(communicator, timeout + vote_grace)
        self._stream = SideStream(self._store.memory.device)
        self._rounds_in_flight = in_flight if duty == 1.0 else 1
        self._pipeline = TransferPipeline(communicator, self._store, in_flight, duty, clock=clock, sleep=sleep)

    @property
    def error(self) -> str | None:
        """Why no further transfer can run before :meth:`recover`; None while one can."""
        return self._vote.error

    @property
    def max_staged_experts(self) -> int:
        """Experts that fit into staging at once: what ``plan_transfer`` must be told."""
        return self._store.memory.capacity

    @property
    def staging_bytes(self) -> int:
        """Bytes allocated for staging now: after :meth:`warm_up` all that it will ever take."""
        return self._store.memory.allocated_bytes

    def bind_thread(self) -> None:
        """To be called first by a thread that is to call :meth:`stage`: makes the weights' device its current one."""
        self._stream.bind_thread()

    def warm_up(self) -> None:
        """Collective, before serving. Does what is slow the first time, or must not happen beside a forward pass.

        Compiles kernels, allocates all of staging (so that a host that sizes its KV cache afterwards sees what is
        left), loads the device's kernels for packing and checksums, makes the transport's host buffers, and opens the
        connection between every pair of ranks.
        """
        compile_program_kernels()
        with self._stream.overlapped():
            self._store.warm_up()
            self._stream.finish()
        self._communicator.reserve(self._store.max_expert_bytes, self._rounds_in_flight)
        self._communicator.connect(self._timeout)
        logger.info("rank %d: %d bytes of staging", self._communicator.rank, self.staging_bytes)

    def agree_on(self, plan: TransferPlan) -> None:
        """Collective, before the first byte moves.

        Raises:
            PlanMismatchError: on every rank, if any two hold plans with different digests.
        """
        digests = self._communicator.all_gather_object(plan.digest)
        if len(set(digests)) > 1:
            ranks = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
            raise PlanMismatchError(f"ranks {ranks} hold another transfer plan than rank 0; digests are {digests}")
        logger.debug("rank %d: plan %s, %d transfers", self._communicator.rank, plan.digest[:12], plan.num_transfers)

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
                with record_function("equipoise.transfer.stage"):
                    # A rank whose live slots are not what the plan says still takes part: its peers wait for it.
                    failure = self._store.check_live(layer_id, batch)
                    self._store.memory.reserve(program.num_staging_slots)
                    self._pipeline.run(layer_id, program, start + self._timeout)
                    self._stream.finish()
                transferred = self._clock()
                with record_function("equipoise.transfer.verify"):
                    self._store.check_staged(layer_id, program)
            except Exception as error:
                failure = failure or error
            failure = self._vote.cast(layer_id, failure)
        ended = self._clock()
        transferred = ended if transferred is None else transferred
        if failure is not None:
            raise failure
        expert_bytes = self._store.expert_bytes(layer_id)
        profile = LayerProfile(
            layer_id=layer_id,
            transfer_seconds=transferred - start,
            verify_seconds=ended - transferred,
            commit_seconds=None,
            bytes_received=expert_bytes * sum(each.receive is not None for each in program.rounds),
            num_rounds=len(program.rounds),
            expert_bytes=expert_bytes,
            peak_staging_bytes=self._store.memory.allocated_bytes,
        )
        return StagedBatch(layer_id, batch, program, profile)

    def commit(self, staged: StagedBatch) -> CommittedBatch:
        """Brings a staged batch into the live slots of this rank. Local: no communication, no wait.

        The caller makes sure that no forward pass reads the layer meanwhile and that the maps change with it. An
        exception from here is not a TransferError: the others have committed, so this rank must stop.
        """
        with record_function("equipoise.transfer.commit"):
            timer = self._stream.begin_commit(self._clock)
            self._store.memory.commit(staged.layer_id, staged.program.copies)
            self._stream.committed(timer)
        return CommittedBatch(staged, timer)

    def recover(self) -> None:
        """Collective, after an InDoubtError on any rank, once none of them is inside a transfer: makes new groups.

        Raises:
            TransferError: they cannot be made; :attr:`error` says why.
        """
        self._vote.recover()

    def forget_canaries(self, layer_ids: Sequence[int]) -> None:
        """Takes the canaries of these layers from the next plan again: their weights were loaded anew by the host."""
        self._store.forget(layer_ids)

    def release_staging(self) -> None:
        """Gives staging memory back between two rebalances; the next one allocates it again."""
        self._store.memory.release()
