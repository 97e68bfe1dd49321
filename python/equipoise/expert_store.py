"""The experts of one rank, live and staged, addressed by place: what is sent, what lands, what commits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from equipoise.communicator import PeerTensor
from equipoise.errors import VerificationError
from equipoise.staging import CHECKSUM_BYTES, ExpertLayout, StagedExpert, StagingArea, require_usable, row_views
from equipoise.topology import EpTopology
from equipoise.transfer_plan import TransferStep
from equipoise.transfer_program import Copy, RankProgram, Receive, Send
from equipoise.verification import Verification, canary_of, checksum, describe_canary


class ExpertStore:
    """See the module. Arguments are those of :class:`~equipoise.updater.ExpertLocationUpdater`."""

    def __init__(
        self,
        rank: int,
        topology: EpTopology,
        expert_weights: Sequence[Sequence[torch.Tensor]],
        verification: Verification,
        staging_bytes: int | None,
        rounds_in_flight: int,
    ) -> None:
        require_usable(expert_weights, topology.slots_per_rank)
        self._rank = rank
        self._topology = topology
        self._verification = verification
        self.device = expert_weights[0][0].device if expert_weights else torch.device("cpu")
        self._weights = [list(tensors) for tensors in expert_weights]
        # Layer -> int64 (slots_per_rank,), zero until a plan has said what the slots hold.
        self._canaries: list[torch.Tensor] = []
        if verification != "off":
            for tensors in self._weights:
                canary = torch.zeros(topology.slots_per_rank, dtype=torch.int64, device=self.device)
                self._canaries.append(canary)
                tensors.append(canary)
        self._rows = [
            [list(rows) for rows in zip(*(row_views(tensor) for tensor in tensors), strict=True)]
            for tensors in self._weights
        ]
        with_checksum = verification == "checksum"
        self._layouts = [ExpertLayout.of(tensors, with_checksum=with_checksum) for tensors in self._weights]
        self._large_fields = [layout.large_fields for layout in self._layouts]
        self.staging = StagingArea(
            self._layouts, staging_bytes, rounds_in_flight, topology.slots_per_rank, rounds_in_flight, self.device
        )

    def message_bytes(self, layer_id: int) -> int:
        """Bytes that travel for one expert of a layer."""
        return self._layouts[layer_id].message_bytes

    def outgoing(self, layer_id: int, send: Send, outbox: int) -> list[PeerTensor]:
        """The messages of one expert: the packed one, if there is any, then the large rows as they lie.

        A relay passes on what it received as it is, checksum included, so that damage on the way shows.
        """
        if send.place < 0:
            return [(send.peer, message) for message in self._staged(layer_id, send.place).messages]
        rows = self._rows[layer_id][send.place]
        messages = [(send.peer, rows[number]) for number in self._large_fields[layer_id]]
        if self._layouts[layer_id].packed_bytes:
            head, packed_rows = self.staging.outbox(layer_id, outbox)
            for number, packed in packed_rows:
                packed.copy_(rows[number])
            if self._verification == "checksum":
                _write_int(head, checksum(rows))
            messages.insert(0, (send.peer, head))
        return messages

    def incoming(self, layer_id: int, receive: Receive) -> list[PeerTensor]:
        """Where the messages of one expert land, in staging."""
        staged = self.staging.slot(layer_id, receive.staging_index)
        return [(receive.peer, message) for message in staged.messages]

    def copy(self, layer_id: int, copy: Copy) -> None:
        """Carries out one copy of a commit, all tensors of the expert."""
        for target, source in zip(
            self._rows_at(layer_id, copy.destination), self._rows_at(layer_id, copy.source), strict=True
        ):
            target.copy_(source)

    def check_live(self, layer_id: int, step: TransferStep) -> Exception | None:
        """What lies in the live slots must be what the plan starts from. The first plan of a layer is believed."""
        if not self._canaries:
            return None
        slots = self._topology.slots_of_rank(self._rank)
        planned = [canary_of(layer_id, expert) for expert in step.old_map[slots.start : slots.stop].tolist()]
        canary = self._canaries[layer_id]
        held = canary.tolist()
        if not any(held):
            canary.copy_(torch.tensor(planned))
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
        if not self._canaries:
            return
        for each in program.rounds:
            if each.receive is None:
                continue
            head, rows, _ = self.staging.slot(layer_id, each.receive.staging_index)
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
            if self._canaries:
                self._canaries[layer_id].zero_()

    def wipe_staged(self, layer_id: int, program: RankProgram) -> None:
        """Loses the first staged expert (fault injection)."""
        if any(each.receive for each in program.rounds):
            for message in self.staging.slot(layer_id, 0).messages:
                message.zero_()

    def damage_staged(self, layer_id: int, program: RankProgram) -> None:
        """Flips bits of the first staged expert's first tensor (fault injection)."""
        if any(each.receive for each in program.rounds):
            self.staging.slot(layer_id, 0).rows[0][:1].bitwise_xor_(0x55)

    def _staged(self, layer_id: int, place: int) -> StagedExpert:
        return self.staging.slot(layer_id, ~place)

    def _rows_at(self, layer_id: int, place: int) -> list[torch.Tensor]:
        """The bytes of an expert's rows, (bytes,) uint8 views, in a live slot or (``place < 0``) a staging slot."""
        return self._rows[layer_id][place] if place >= 0 else self._staged(layer_id, place).rows


def _write_int(packed: torch.Tensor, value: int) -> None:
    packed[:CHECKSUM_BYTES].view(torch.int64).fill_(value)


def _read_int(packed: torch.Tensor) -> int:
    return int(packed[:CHECKSUM_BYTES].view(torch.int64))
