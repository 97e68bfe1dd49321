"""Addresses the experts of one rank by place, live and staged: what is sent, what lands, what is checked."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from equipoise.config import Verification
from equipoise.distributed.communicator import PeerTensor
from equipoise.errors import VerificationError
from equipoise.topology import EpTopology
from equipoise.transfer.memory.host_weights import ExpertTensor
from equipoise.transfer.memory.pool import ExpertPool
from equipoise.transfer.memory.pooled import PooledExperts
from equipoise.transfer.memory.protocol import ExpertMemory
from equipoise.transfer.memory.stacked import StackedExperts
from equipoise.transfer.memory.staging import CHECKSUM_BYTES, StagedExpert
from equipoise.transfer.memory.verification import canary_of, checksum, checksum_on_device, describe_canary
from equipoise.transfer.planning.rank_program import RankProgram, Receive, Send, is_staging, staging_index
from equipoise.transfer.planning.types import TransferBatch

ExpertWeights = Sequence[Sequence[ExpertTensor]] | ExpertPool | ExpertMemory
"""``[layer][i]``: tensors of each layer, (slots_per_rank, ...) each, or lists of slots_per_rank tensors; or rows that
all layers share; or a memory of the host's own."""


class ExpertStore:
    """See the module. Arguments are those of :class:`~equipoise.transfer.execution.updater.ExpertLocationUpdater`.

    Args:
        default_staged: experts that staging holds where ``staging_bytes`` is None.
        num_send_buffers: experts that may be on their way out at once.
    """

    def __init__(
        self,
        rank: int,
        topology: EpTopology,
        expert_weights: ExpertWeights,
        verification: Verification,
        staging_bytes: int | None,
        *,
        default_staged: int,
        num_send_buffers: int,
    ) -> None:
        self._topology = topology
        self._slots = topology.slots_of_rank(rank)
        self._verification = verification
        self.memory: ExpertMemory
        if isinstance(expert_weights, ExpertPool):
            self.memory = PooledExperts(
                expert_weights, topology.slots_per_rank, verification, num_send_buffers=num_send_buffers
            )
        elif isinstance(expert_weights, ExpertMemory):
            self.memory = expert_weights
        else:
            self.memory = StackedExperts(
                expert_weights,
                topology.slots_per_rank,
                verification,
                staging_bytes,
                default_staged=default_staged,
                num_send_buffers=num_send_buffers,
            )
        self._on_cpu = self.memory.device.type == "cpu"

    def expert_bytes(self, layer_id: int) -> int:
        """Returns the bytes that travel for one expert of a layer."""
        return self.memory.layouts[layer_id].message_bytes

    @property
    def max_expert_bytes(self) -> int:
        """Bytes that travel for one expert of the largest layer."""
        return max((layout.message_bytes for layout in self.memory.layouts), default=0)

    def warm_up(self) -> None:
        """Allocates all of staging, and on a device loads what packs and checks experts.

        Hazard: CUDA loads a kernel at its first use, with a synchronisation of the whole device. Beside a transfer that
        waits for another rank, which does the same, that may never end.
        """
        self.memory.reserve(self.memory.capacity)
        if not self.memory.layouts or not self.memory.capacity:
            return
        if self._verification == "checksum":
            checksum([torch.zeros(8, dtype=torch.uint8)])
        if self._on_cpu:
            return
        layer_id = max(range(len(self.memory.layouts)), key=lambda layer: self.memory.layouts[layer].message_bytes)
        for _, message in self.outgoing(layer_id, Send(0, 0, 0), 0):
            staged = self.memory.staged(layer_id, 0)
            staged.rows[0][: message.numel()].copy_(message[: staged.rows[0].numel()])
        if self._verification != "off":
            self._checks_of([self.memory.staged(layer_id, 0)])
            self.memory.canaries(layer_id)

    def outgoing(self, layer_id: int, send: Send, buffer: int) -> list[PeerTensor]:
        """Returns the messages of one expert: the packed one, if there is any, then the large rows as they lie.

        A relay passes on what it received as it is, checksum included, so that damage on the way shows.
        """
        if is_staging(send.place):
            relayed = self.memory.staged(layer_id, staging_index(send.place))
            return [(send.peer, message) for message in relayed.messages]
        rows = self.memory.live(layer_id, send.place)
        layout = self.memory.layouts[layer_id]
        messages = [(send.peer, rows[number]) for number in layout.large_fields]
        if layout.packed_bytes:
            head, packed_rows = self.memory.send_buffer(layer_id, buffer)
            for number, packed in packed_rows:
                packed.copy_(rows[number])
            if self._verification == "checksum":
                total = _checksum_field(head)
                if self._on_cpu:
                    total.fill_(checksum(rows))
                else:
                    total.copy_(checksum_on_device(rows))
            messages.insert(0, (send.peer, head))
        return messages

    def incoming(self, layer_id: int, receive: Receive) -> list[PeerTensor]:
        """Returns where the messages of one expert land, in staging."""
        staged = self.memory.staged(layer_id, receive.staging_index)
        return [(receive.peer, message) for message in staged.messages]

    def check_live(self, layer_id: int, batch: TransferBatch) -> Exception | None:
        """Compares the live slots with what the plan starts from. The first plan of a layer is believed."""
        if self._verification == "off":
            return None
        slots = self._slots
        planned = [canary_of(layer_id, expert) for expert in batch.old_map[slots.start : slots.stop].tolist()]
        held = self.memory.canaries(layer_id)
        if not any(held):
            self.memory.set_canaries(layer_id, planned)
        elif held != planned:
            wrong = next(i for i, (a, b) in enumerate(zip(held, planned, strict=True)) if a != b)
            return VerificationError(
                f"slot {slots.start + wrong} holds {describe_canary(held[wrong])}, the plan starts from "
                f"{describe_canary(planned[wrong])}"
            )
        return None

    def check_staged(self, layer_id: int, program: RankProgram) -> None:
        """Compares canary and checksum of everything that has landed.

        Raises:
            VerificationError: the first one that differs.
        """
        receives = [each.receive for each in program.rounds if each.receive is not None]
        if self._verification == "off" or not receives:
            return
        staged = [self.memory.staged(layer_id, receive.staging_index) for receive in receives]
        for receive, (found, sent, landed) in zip(receives, self._checks_of(staged), strict=True):
            expected = canary_of(layer_id, receive.expert)
            if found != expected:
                raise VerificationError(
                    f"rank {receive.peer} was to send {describe_canary(expected)}, "
                    f"what arrived is {describe_canary(found)}"
                )
            if sent != landed:
                raise VerificationError(
                    f"{describe_canary(expected)} from rank {receive.peer} is damaged: "
                    f"checksum {sent:#x} where it was sent, {landed:#x} where it landed"
                )

    def forget(self, layer_ids: Sequence[int]) -> None:
        """Believes the next plan about what these layers hold: the host loaded their weights anew."""
        for layer_id in layer_ids:
            self.memory.set_canaries(layer_id, [0] * self._topology.slots_per_rank)

    def _checks_of(self, staged: Sequence[StagedExpert]) -> list[list[int]]:
        """Returns canary, checksum as sent and as landed (0 and 0 without checksums) of each expert.

        From a device they come in one copy, however many experts there are.
        """
        if self._on_cpu:
            if self._verification != "checksum":
                return [[int(rows[-1].view(torch.int64)), 0, 0] for _, rows, _ in staged]
            return [
                [int(rows[-1].view(torch.int64)), int(_checksum_field(head)), checksum(rows)]
                for head, rows, _ in staged
            ]
        found = torch.zeros(len(staged), 3, dtype=torch.int64, device=self.memory.device)
        for row, (head, rows, _) in zip(found, staged, strict=True):
            row[0:1].copy_(rows[-1].view(torch.int64))
            if self._verification == "checksum":
                row[1:2].copy_(_checksum_field(head))
                row[2].copy_(checksum_on_device(rows))
        checks: list[list[int]] = found.tolist()
        return checks


def _checksum_field(packed: torch.Tensor) -> torch.Tensor:
    return packed[:CHECKSUM_BYTES].view(torch.int64)
