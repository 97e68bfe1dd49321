"""Moves expert weights between ranks: stage, verify, vote, commit.

A step of a plan is staged while the live weights serve on: what a rank receives lands in its staging area, never in a
live slot. Then the ranks vote. Only if all of them hold what the plan names does :meth:`ExpertLocationUpdater.commit`
copy it into the live slots, which is local and short. If any rank failed, every rank raises the same kind of
:class:`~equipoise.errors.TransferError` and no live byte has changed on any of them.

Verification ``canary``: next to the weights of each layer lies one int64 per slot, the id of the expert that the slot
holds. It is set once, from the map of the first plan, and then moves only by the same messages and copies as the
weights; it is compared with the plan before anything is sent and again where it lands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from equipoise.communicator import Communicator, PeerTensor
from equipoise.errors import PlanMismatchError, TransferError, TransferTimeout, VerificationError
from equipoise.staging import ExpertLayout, StagingArea, require_usable, row_bytes_of
from equipoise.topology import EpTopology
from equipoise.transfer_plan import LayerTransferPlan, TransferPlan, TransferStep
from equipoise.transfer_program import RankProgram, Receive, Send, rank_program
from equipoise.transfer_report import LayerTransferReport

Verification = Literal["off", "canary"]

# A rank that failed at once votes at once, and waits for those that find out by their timeout. A vote that is given up
# too early would leave ranks in doubt whether the others committed; a rank that died is noticed without waiting.
VOTE_GRACE_SECONDS = 30.0

# What a rank votes; the highest one cast decides which error all of them raise.
_FINE, _FAILED, _TIMED_OUT, _NOT_WHAT_WAS_SENT = range(4)
_ERRORS = {_FAILED: TransferError, _TIMED_OUT: TransferTimeout, _NOT_WHAT_WAS_SENT: VerificationError}


@dataclass(eq=False)
class StagedStep:
    """A step that all ranks hold and have verified; ready for :meth:`ExpertLocationUpdater.commit`."""

    layer_id: int
    step: TransferStep
    program: RankProgram
    report: LayerTransferReport


class ExpertLocationUpdater:
    """Executes transfer plans on one rank.

    Args:
        communicator: reaches the other ranks; the group must be no one else's while a transfer runs.
        topology: where slots lie.
        expert_weights: ``[layer][i]``, the live tensors of this rank, each (slots_per_rank, ...) with contiguous rows,
            of any dtype. They are written by commits only.
        verification: see the module.
        staging_bytes: most bytes to allocate for staging; None: the rank's slots of the largest layer.
        timeout: seconds that staging one step may take.
        clock: seconds, monotonic.

    Raises:
        ConfigError: unusable weights, or a budget below one expert.
    """

    def __init__(
        self,
        communicator: Communicator,
        topology: EpTopology,
        expert_weights: Sequence[Sequence[torch.Tensor]],
        *,
        verification: Verification = "canary",
        staging_bytes: int | None = None,
        timeout: float = 60.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        require_usable(expert_weights, topology.slots_per_rank)
        self._communicator = communicator
        self._topology = topology
        self._timeout = timeout
        self._clock = clock
        self._verification = verification
        device = expert_weights[0][0].device if expert_weights else torch.device("cpu")
        self._weights = [list(tensors) for tensors in expert_weights]
        self._canaries: list[torch.Tensor] = []
        if verification != "off":
            self._canaries = [
                torch.full((topology.slots_per_rank,), -1, dtype=torch.int64, device=device) for _ in expert_weights
            ]
            for tensors, canary in zip(self._weights, self._canaries, strict=True):
                tensors.append(canary)
        self._layouts = [ExpertLayout.of(tensors) for tensors in self._weights]
        self._staging = StagingArea(self._layouts, staging_bytes, topology.slots_per_rank, device)
        self.broken: str | None = None
        """Why no further transfer can run; None while one can."""

    @property
    def max_staged_experts(self) -> int:
        """Experts that fit into staging at once; a plan must not ask for more on any rank."""
        return self._staging.capacity

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
        self, layer_plan: LayerTransferPlan, on_commit: Callable[[TransferStep], None] | None = None
    ) -> LayerTransferReport:
        """Collective. Stages and commits all steps of a layer, one after the other.

        Args:
            layer_plan: the same on every rank.
            on_commit: called after each step's commit: the maps must follow the weights now. Needed where a plan has
                several steps for a layer, since a failure in a later one leaves the layer at ``step.new_map``.

        Raises:
            TransferError: on every rank; the step that failed changed nothing anywhere.
        """
        assert on_commit is not None or len(layer_plan.steps) == 1
        report: LayerTransferReport | None = None
        for step in layer_plan.steps:
            staged = self.stage(layer_plan.layer_id, step)
            cost = self.commit(staged)
            if on_commit is not None:
                on_commit(step)
            report = cost if report is None else report + cost
        assert report is not None
        return report

    def stage(self, layer_id: int, step: TransferStep) -> StagedStep:
        """Collective. Brings everything that the step needs into staging, verifies it, and votes.

        Raises:
            TransferError: on every rank, if any of them failed; VerificationError if what arrived is not what was
                sent, TransferTimeout if a peer did not answer in time. Live weights are as they were.
        """
        start = self._clock()
        program = rank_program(step, self._communicator.rank, self._topology)
        sent = np.zeros(self._topology.num_ranks, np.int64)
        received = np.zeros(self._topology.num_ranks, np.int64)
        # A rank whose live slots are not what the plan says still takes part: its peers would wait for it in vain.
        failure = self._check_live_canaries(layer_id, step)
        try:
            self._staging.reserve(program.num_staging_slots)
            for each in program.rounds:
                left = self._timeout - (self._clock() - start)
                sends = self._outgoing(layer_id, each.send) if each.send else []
                recvs = self._incoming(layer_id, each.receive) if each.receive else []
                self._communicator.exchange(sends, recvs, max(left, 0.001))
                _count(sends, sent)
                _count(recvs, received)
            transferred = self._clock()
            self._check_staged(layer_id, program)
        except Exception as error:
            transferred = self._clock()
            failure = failure or error
        self._vote(layer_id, failure)
        report = LayerTransferReport(
            layer_id=layer_id,
            rank=self._communicator.rank,
            topology=self._topology,
            sent_to_rank=sent,
            received_from_rank=received,
            num_rounds=len(program.rounds),
            num_steps=1,
            transfer_seconds=transferred - start,
            verify_seconds=self._clock() - transferred,
            commit_seconds=0.0,
            peak_staging_bytes=self._staging.allocated_bytes,
        )
        return StagedStep(layer_id, step, program, report)

    def commit(self, staged: StagedStep) -> LayerTransferReport:
        """Copies a staged step into the live slots of this rank. Local, no communication; cannot fail by halves.

        The caller makes sure that no forward pass reads the layer meanwhile and that the maps change with it.
        """
        start = self._clock()
        layout, tensors = self._layouts[staged.layer_id], self._weights[staged.layer_id]
        for source, destination in staged.program.copies:
            for index, tensor in enumerate(tensors):
                self._place(tensor, index, layout, destination).copy_(self._place(tensor, index, layout, source))
        report = staged.report
        return LayerTransferReport(
            **{**vars(report), "commit_seconds": report.commit_seconds + self._clock() - start},
        )

    def forget_canaries(self, layer_ids: Sequence[int]) -> None:
        """Takes the canaries of these layers from the next plan again: their weights were loaded anew by the host."""
        for layer_id in layer_ids:
            if self._canaries:
                self._canaries[layer_id].fill_(-1)

    def release_staging(self) -> None:
        """Gives staging memory back between two rebalances."""
        self._staging.release()

    def _place(self, tensor: torch.Tensor, index: int, layout: ExpertLayout, place: int) -> torch.Tensor:
        """The bytes of one tensor's row in a live slot (``place >= 0``) or in a staging slot."""
        if place >= 0:
            return row_bytes_of(tensor, place)
        field = layout.fields[index]
        return self._staging.slot(~place, layout)[field.offset : field.offset + field.num_bytes]

    def _outgoing(self, layer_id: int, send: Send) -> list[PeerTensor]:
        layout, tensors = self._layouts[layer_id], self._weights[layer_id]
        packed = self._staging.outbox(layout)
        messages = [(send.peer, packed)] if layout.packed_bytes else []
        for index, (tensor, field) in enumerate(zip(tensors, layout.fields, strict=True)):
            row = self._place(tensor, index, layout, send.place)
            if field.packed:
                packed[field.offset : field.offset + field.num_bytes].copy_(row)
            else:
                messages.append((send.peer, row))
        return messages

    def _incoming(self, layer_id: int, receive: Receive) -> list[PeerTensor]:
        layout = self._layouts[layer_id]
        slot = self._staging.slot(receive.staging_index, layout)
        messages = [(receive.peer, slot[: layout.packed_bytes])] if layout.packed_bytes else []
        for field in layout.fields:
            if not field.packed:
                messages.append((receive.peer, slot[field.offset : field.offset + field.num_bytes]))
        return messages

    def _check_live_canaries(self, layer_id: int, step: TransferStep) -> Exception | None:
        """What lies in the live slots must be what the plan starts from."""
        if not self._canaries:
            return None
        slots = self._topology.slots_of_rank(self._communicator.rank)
        planned = step.old_map[slots.start : slots.stop].tolist()
        canary = self._canaries[layer_id]
        held = canary.tolist()
        if held == [-1] * len(held):
            canary.copy_(torch.tensor(planned))
        elif held != planned:
            return VerificationError(f"live slots hold experts {held}, the plan starts from {planned}")
        return None

    def _check_staged(self, layer_id: int, program: RankProgram) -> None:
        if not self._canaries:
            return
        layout = self._layouts[layer_id]
        field = layout.fields[-1]  # the canary is the last tensor of its layer
        for each in program.rounds:
            if each.receive is None:
                continue
            slot = self._staging.slot(each.receive.staging_index, layout)
            found = int(slot[field.offset : field.offset + field.num_bytes].view(torch.int64))
            if found != each.receive.expert:
                raise VerificationError(
                    f"rank {each.receive.peer} was to send expert {each.receive.expert}, what arrived is {found}"
                )

    def _vote(self, layer_id: int, failure: Exception | None) -> None:
        """Returns if no rank failed; else raises the same kind of error on all of them."""
        votes = torch.zeros(self._communicator.world_size, dtype=torch.int64)
        votes[self._communicator.rank] = _ballot(failure)
        self._communicator.all_reduce_sum_(votes, self._timeout + VOTE_GRACE_SECONDS)
        worst = int(votes.max())
        if worst == _FINE:
            return
        words = self._communicator.all_gather_object("" if failure is None else str(failure))
        told = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(words) if votes[rank] == worst)
        if worst == _TIMED_OUT or (votes == _FAILED).any():
            self._rebuild(told)
        raise _ERRORS[worst](f"layer {layer_id} was not migrated: {told}") from failure

    def _rebuild(self, told: str) -> None:
        """Replaces the bulk transport, which a failed exchange may have left with half a message."""
        try:
            self._communicator.rebuild()
        except TransferError as error:
            self.broken = f"{error} (after: {told})"


def _ballot(failure: Exception | None) -> int:
    match failure:
        case None:
            return _FINE
        case VerificationError():
            return _NOT_WHAT_WAS_SENT
        case TransferTimeout():
            return _TIMED_OUT
        case _:
            return _FAILED


def _count(messages: Sequence[PeerTensor], per_rank: np.ndarray) -> None:
    for peer, tensor in messages:
        per_rank[peer] += tensor.numel()
