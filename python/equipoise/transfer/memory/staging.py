"""Allocates staging slots and send buffers, and lays an expert's tensors out in a message.

An expert of a layer is one row of each of the layer's tensors (weights, scales, biases, ... of any dtype). Rows of at
least ``PACK_BELOW_BYTES`` travel as messages of their own, straight from the live tensor. Smaller ones would cost more
in latency than in bytes, so they are packed into one message together with the checksum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from equipoise.errors import ConfigError
from equipoise.transfer.memory.host_weights import ExpertTensor

PACK_BELOW_BYTES = 16 * 1024
ALIGNMENT = 64  # bytes; every dtype's view starts on a multiple of its size
CHECKSUM_BYTES = 8


@dataclass(frozen=True)
class Field:
    """One tensor's row within a staged expert."""

    offset: int  # bytes from the start of the staging slot
    num_bytes: int
    packed: bool


@dataclass(frozen=True)
class ExpertLayout:
    """How one expert of a layer lies in a staging slot: checksum, packed rows, then the large rows."""

    fields: tuple[Field, ...]  # in the order of the layer's tensors
    packed_bytes: int  # length of the packed message: checksum, small rows and padding; 0: there is none
    slot_bytes: int  # bytes of a staging slot

    @cached_property
    def large_fields(self) -> list[int]:
        """Numbers of the fields that travel as messages of their own."""
        return [number for number, field in enumerate(self.fields) if field.num_bytes and not field.packed]

    @property
    def message_bytes(self) -> int:
        """What travels for one expert."""
        return self.packed_bytes + sum(self.fields[number].num_bytes for number in self.large_fields)

    @classmethod
    def of(cls, tensors: Sequence[ExpertTensor], *, with_checksum: bool = False) -> ExpertLayout:
        """Makes the layout for a layer's live tensors."""
        sizes = [tensor[0].numel() * tensor[0].element_size() for tensor in tensors]
        offsets: dict[int, int] = {}
        at = _aligned(CHECKSUM_BYTES) if with_checksum else 0
        for packed in (True, False):
            for index, size in enumerate(sizes):
                if (size < PACK_BELOW_BYTES) == packed:
                    offsets[index] = at
                    at += _aligned(size)
            if packed:
                packed_bytes = at
        fields = tuple(Field(offsets[i], size, size < PACK_BELOW_BYTES) for i, size in enumerate(sizes))
        return cls(fields, packed_bytes, at)


class StagedExpert(NamedTuple):
    """One staging slot: views of its bytes, (bytes,) uint8 each."""

    head: torch.Tensor  # the packed message
    rows: list[torch.Tensor]  # in the order of the layout's fields
    messages: list[torch.Tensor]  # what travels, in order: the head unless it is empty, then the large rows


class SendBuffer(NamedTuple):
    """Where the packed message of an expert that is sent from a live slot is put together; views as above."""

    head: torch.Tensor
    packed_rows: list[tuple[int, torch.Tensor]]  # number of the field, its part of the head


class StagingArea:
    """A bounded number of staging slots, and send buffers for the packed part of what is being sent.

    Views are made once and kept, since a batch would spend more time on making them than on all the rest.

    Args:
        layouts: one per layer.
        budget: most bytes it may ever allocate; None: ``default_slots`` slots of the largest layout.
        default_slots: see ``budget``.
        max_slots: more than these are never needed.
        num_send_buffers: experts that may be on their way out at once.
        device: where it lives.

    Raises:
        ConfigError: the budget does not hold a single expert; the message names the least that would do.
    """

    def __init__(
        self,
        layouts: Sequence[ExpertLayout],
        budget: int | None,
        default_slots: int,
        max_slots: int,
        num_send_buffers: int,
        device: torch.device,
    ) -> None:
        self._device = device
        kinds = {layout: number for number, layout in enumerate(dict.fromkeys(layouts))}
        self._layouts = list(kinds)
        self._kind_of_layer = [kinds[layout] for layout in layouts]
        self._send_stride = max((layout.packed_bytes for layout in layouts), default=0)
        self._send_bytes = num_send_buffers * self._send_stride
        self._stride = max((layout.slot_bytes for layout in layouts), default=0)
        self.capacity = staging_slots(layouts, budget, default_slots, max_slots, num_send_buffers)
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._slots: dict[tuple[int, int], StagedExpert] = {}
        self._send_buffers: dict[tuple[int, int], SendBuffer] = {}

    @property
    def allocated_bytes(self) -> int:
        return self._memory.numel()

    def reserve(self, num_slots: int) -> None:
        """Makes room for ``num_slots`` staging slots; what was staged before is lost.

        Raises:
            ConfigError: more than ``capacity``.
        """
        if num_slots > self.capacity:
            raise ConfigError(
                f"the plan stages {num_slots} experts at once on a rank whose staging holds {self.capacity}: plan with "
                f"max_staged_experts={self.capacity}, or raise eplb_staging_bytes",
                field="max_staged_experts",
            )
        needed = self._send_bytes + num_slots * self._stride
        if needed > self._memory.numel():
            self.release()  # the old one goes first: never both at once
            self._memory = torch.empty(needed, dtype=torch.uint8, device=self._device)

    def release(self) -> None:
        """Gives the memory back; the next :meth:`reserve` allocates it again."""
        self._slots.clear()
        self._send_buffers.clear()
        self._memory = torch.empty(0, dtype=torch.uint8)

    def send_buffer(self, layer_id: int, index: int) -> SendBuffer:
        """Returns send buffer ``index`` for an expert of a layer."""
        kind = self._kind_of_layer[layer_id]
        if (kind, index) not in self._send_buffers:
            layout = self._layouts[kind]
            head = self._part(index * self._send_stride, layout.packed_bytes)
            packed = [(number, field) for number, field in enumerate(layout.fields) if field.packed]
            self._send_buffers[kind, index] = SendBuffer(
                head, [(number, head[field.offset : field.offset + field.num_bytes]) for number, field in packed]
            )
        return self._send_buffers[kind, index]

    def slot(self, layer_id: int, index: int) -> StagedExpert:
        """Returns staging slot ``index`` for an expert of a layer."""
        kind = self._kind_of_layer[layer_id]
        if (kind, index) not in self._slots:
            layout = self._layouts[kind]
            whole = self._part(self._send_bytes + index * self._stride, layout.slot_bytes)
            rows = [whole[field.offset : field.offset + field.num_bytes] for field in layout.fields]
            head = whole[: layout.packed_bytes]
            large = [rows[number] for number in layout.large_fields]
            self._slots[kind, index] = StagedExpert(head, rows, [head, *large] if layout.packed_bytes else large)
        return self._slots[kind, index]

    def _part(self, start: int, num_bytes: int) -> torch.Tensor:
        return self._memory[start : start + num_bytes]


def staging_slots(
    layouts: Sequence[ExpertLayout], budget: int | None, default_slots: int, max_slots: int, num_send_buffers: int
) -> int:
    """How many staging slots to have; arguments are those of :class:`StagingArea`.

    Raises:
        ConfigError: the budget does not hold a single expert; the message names the least that would do.
    """
    stride = max((layout.slot_bytes for layout in layouts), default=0)
    send_bytes = num_send_buffers * max((layout.packed_bytes for layout in layouts), default=0)
    if budget is None or not stride:
        return min(default_slots, max_slots)
    if budget < send_bytes + stride:
        raise ConfigError(
            f"eplb_staging_bytes={budget} does not hold one expert of the largest layer: at least "
            f"{send_bytes + stride} needed",
            field="eplb_staging_bytes",
        )
    return min((budget - send_bytes) // stride, max_slots)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
