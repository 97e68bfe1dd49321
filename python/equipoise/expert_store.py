"""The experts of one rank, live and staged, addressed by place: what is sent, what lands, what commits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from equipoise.communicator import PeerTensor
from equipoise.errors import VerificationError
from equipoise.staging import CHECKSUM_BYTES, ExpertLayout, StagingArea, require_usable, row_bytes_of
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
        num_outboxes: int,
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
        with_checksum = verification == "checksum"
        self._layouts = [ExpertLayout.of(tensors, with_checksum=with_checksum) for tensors in self._weights]
        self.staging = StagingArea(self._layouts, staging_bytes, topology.slots_per_rank, num_outboxes, self.device)

    def outgoing(self, layer_id: int, send: Send, outbox: int) -> list[PeerTensor]:
        """The messages of one expert: the packed one, if there is any, then the large rows as they lie."""
        layout = self._layouts[layer_id]
        rows = self._rows(layer_id, send.place)
        messages: list[PeerTensor] = []
        if layout.packed_bytes:
            packed = self._relayed_head(layout, send.place) if send.place < 0 else self.staging.outbox(outbox, layout)
            if send.place >= 0:
                for row, field in zip(rows, layout.fields, strict=True):
                    if field.packed:
                        packed[field.offset : field.offset + field.num_bytes].copy_(row)
                if self._verification == "checksum":
                    _write_int(packed, checksum(rows))
            messages.append((send.peer, packed))
        messages += [
            (send.peer, row) for row, field in zip(rows, layout.fields, strict=True) if row.numel() and not field.packed
        ]
        return messages

    def incoming(self, layer_id: int, receive: Receive) -> list[PeerTensor]:
        """Where the messages of one expert land, in staging."""
        layout = self._layouts[layer_id]
        slot = self.staging.slot(receive.staging_index, layout)
        messages = [(receive.peer, slot[: layout.packed_bytes])] if layout.packed_bytes else []
        messages += [
            (receive.peer, slot[field.offset : field.offset + field.num_bytes])
            for field in layout.fields
            if field.num_bytes and not field.packed
        ]
        return messages

    def copy(self, layer_id: int, copy: Copy) -> None:
        """Carries out one copy of a commit, all tensors of the expert."""
        rows = self._rows(layer_id, copy.source)
        for target, source in zip(self._rows(layer_id, copy.destination), rows, strict=True):
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
        layout = self._layouts[layer_id]
        for each in program.rounds:
            if each.receive is None:
                continue
            rows = self._rows(layer_id, ~each.receive.staging_index)
            found, expected = int(rows[-1].view(torch.int64)), canary_of(layer_id, each.receive.expert)
            if found != expected:
                raise VerificationError(
                    f"rank {each.receive.peer} was to send {describe_canary(expected)}, "
                    f"what arrived is {describe_canary(found)}"
                )
            if self._verification == "checksum":
                sent, landed = _read_int(self.staging.slot(each.receive.staging_index, layout)), checksum(rows)
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
            self.staging.slot(0, self._layouts[layer_id]).zero_()

    def damage_staged(self, layer_id: int, program: RankProgram) -> None:
        """Flips bits of the first staged expert's first tensor (fault injection)."""
        if any(each.receive for each in program.rounds):
            self._rows(layer_id, ~0)[0][:1].bitwise_xor_(0x55)

    def _relayed_head(self, layout: ExpertLayout, place: int) -> torch.Tensor:
        """The packed message as it was received: a relay passes its checksum on, so damage on the way shows."""
        return self.staging.slot(~place, layout)[: layout.packed_bytes]

    def _rows(self, layer_id: int, place: int) -> list[torch.Tensor]:
        """The bytes of an expert's rows, (bytes,) uint8 views, in a live slot or (``place < 0``) a staging slot."""
        if place >= 0:
            return [row_bytes_of(tensor, place) for tensor in self._weights[layer_id]]
        layout = self._layouts[layer_id]
        slot = self.staging.slot(~place, layout)
        return [slot[field.offset : field.offset + field.num_bytes] for field in layout.fields]


def _write_int(packed: torch.Tensor, value: int) -> None:
    packed[:CHECKSUM_BYTES].view(torch.int64).fill_(value)


def _read_int(packed: torch.Tensor) -> int:
    return int(packed[:CHECKSUM_BYTES].view(torch.int64))
