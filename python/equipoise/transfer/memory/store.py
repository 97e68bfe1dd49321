"""The experts of one rank, live and staged, addressed by place: what is sent, what lands, what commits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from equipoise.distributed.communicator import PeerTensor
from equipoise.errors import VerificationError
from equipoise.topology import EpTopology
from equipoise.transfer.memory.pool import ExpertPool
from equipoise.transfer.memory.pooled import PooledExperts
from equipoise.transfer.memory.stacked import ExpertMemory, StackedExperts
from equipoise.transfer.memory.staging import CHECKSUM_BYTES
from equipoise.transfer.memory.verification import Verification, canary_of, checksum, describe_canary
from equipoise.transfer.planning.rank_program import RankProgram, Receive, Send, is_staging, staging_index
from equipoise.transfer.planning.types import TransferBatch

ExpertWeights = Sequence[Sequence[torch.Tensor]] | ExpertPool
"""``[layer][i]``: tensors of each layer, (slots_per_rank, ...) each; or rows that all layers share."""


class ExpertStore:
    """See the module. Arguments are those of :class:`~equipoise.transfer.execution.updater.ExpertLocationUpdater`."""

    def __init__(
        self,
        rank: int,
        topology: EpTopology,
        expert_weights: ExpertWeights,
        verification: Verification,
        staging_bytes: int | None,
        rounds_in_flight: int,
    ) -> None:
        self._rank = rank
        self._topology = topology
        self._verification = verification
        self.memory: ExpertMemory
        if isinstance(expert_weights, ExpertPool):
            self.memory = PooledExperts(expert_weights, topology.slots_per_rank, verification, rounds_in_flight)
        else:
            self.memory = StackedExperts(
                expert_weights, topology.slots_per_rank, verification, staging_bytes, rounds_in_flight
            )

    def message_bytes(self, layer_id: int) -> int:
        """Bytes that travel for one expert of a layer."""
        return self.memory.layouts[layer_id].message_bytes

    def outgoing(self, layer_id: int, send: Send, send_buffer: int) -> list[PeerTensor]:
        """The messages of one expert: the packed one, if there is any, then the large rows as they lie.

        A relay passes on what it received as it is, checksum included, so that damage on the way shows.
        """
        if is_staging(send.place):
            relayed = self.memory.staged(layer_id, staging_index(send.place))
            return [(send.peer, message) for message in relayed.messages]
        rows = self.memory.live(layer_id, send.place)
        layout = self.memory.layouts[layer_id]
        messages = [(send.peer, rows[number]) for number in layout.large_fields]
        if layout.packed_bytes:
            head, packed_rows = self.memory.send_buffer(layer_id, send_buffer)
            for number, packed in packed_rows:
                packed.copy_(rows[number])
            if self._verification == "checksum":
                _write_int(head, checksum(rows))
            messages.insert(0, (send.peer, head))
        return messages

    def incoming(self, layer_id: int, receive: Receive) -> list[PeerTensor]:
        """Where the messages of one expert land, in staging."""
        staged = self.memory.staged(layer_id, receive.staging_index)
        return [(receive.peer, message) for message in staged.messages]

    def check_live(self, layer_id: int, batch: TransferBatch) -> Exception | None:
        """What lies in the live slots must be what the plan starts from. The first plan of a layer is believed."""
        if self._verification == "off":
            return None
        slots = self._topology.slots_of_rank(self._rank)
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
        if self._verification == "off":
            return
        for each in program.rounds:
            if each.receive is None:
                continue
            head, rows, _ = self.memory.staged(layer_id, each.receive.staging_index)
            found, expected = int(rows[-1].view(torch.int64)), canary_of(layer_id, each.receive.expert)
            if found != expected:
                raise VerificationError(
                    f"rank {each.receive.peer} was to send {describe_canary(expected)}, "
                    f"what arrived is {describe_canary(found)}"
                )
            if self._verification == "checksum":
                sent, landed = _read_int(head), checksum(rows)
                if sent != landed:
                    raise VerificationError(
                        f"{describe_canary(expected)} from rank {each.receive.peer} is damaged: "
                        f"checksum {sent:#x} where it was sent, {landed:#x} where it landed"
                    )

    def forget(self, layer_ids: Sequence[int]) -> None:
        """Believes the next plan about what these layers hold: the host loaded their weights anew."""
        for layer_id in layer_ids:
            self.memory.set_canaries(layer_id, [0] * self._topology.slots_per_rank)

    def wipe_staged(self, layer_id: int, program: RankProgram) -> None:
        """Loses the first staged expert (fault injection)."""
        if any(each.receive for each in program.rounds):
            for message in self.memory.staged(layer_id, 0).messages:
                message.zero_()

    def damage_staged(self, layer_id: int, program: RankProgram) -> None:
        """Flips bits of the first staged expert's first tensor (fault injection)."""
        if any(each.receive for each in program.rounds):
            self.memory.staged(layer_id, 0).rows[0][:1].bitwise_xor_(0x55)


def _write_int(packed: torch.Tensor, value: int) -> None:
    packed[:CHECKSUM_BYTES].view(torch.int64).fill_(value)


def _read_int(packed: torch.Tensor) -> int:
    return int(packed[:CHECKSUM_BYTES].view(torch.int64))
