"""Broadcasts the input of each step from rank 0 to the other ranks."""

from __future__ import annotations

import pickle
from dataclasses import dataclass

import torch
import torch.distributed as dist

from equipoise.engine.model.step_batch import StepBatch
from equipoise.manager.commands import Command

_HEADER = 8  # bytes that hold the size of the message
_FRAME = 4096  # bytes of the first broadcast; one suffices for all but long prompts


@dataclass(frozen=True)
class StepInput:
    """One turn of every rank's loop: submit the commands, run the batch if there is one, tick.

    ``ping``: all ranks meet in a barrier, so that rank 0 can say that they live. ``stop``: they leave their loops.
    """

    batch: StepBatch | None = None
    commands: tuple[Command, ...] = ()
    ping: bool = False
    stop: bool = False


class StepChannel:
    """Broadcast step inputs from rank 0. Waiting for one takes no processor time and has no timeout.

    Args:
        group: a gloo group of all ranks whose timeout is longer than any idle time; None for one rank.
        rank: this rank.
    """

    def __init__(self, group: dist.ProcessGroup | None, rank: int) -> None:
        self._group = group
        self._rank = rank

    def send(self, step_input: StepInput) -> None:
        if self._group is None:
            return
        payload = pickle.dumps(step_input)
        data = len(payload).to_bytes(_HEADER, "little") + payload
        frame = torch.frombuffer(bytearray(data[:_FRAME].ljust(_FRAME, b"\0")), dtype=torch.uint8)
        dist.broadcast(frame, group_src=0, group=self._group)
        if len(data) > _FRAME:
            dist.broadcast(
                torch.frombuffer(bytearray(data[_FRAME:]), dtype=torch.uint8), group_src=0, group=self._group
            )

    def meet(self) -> None:
        """Wait for all ranks. Collective."""
        if self._group is not None:
            dist.barrier(group=self._group)

    def receive(self) -> StepInput:
        assert self._group is not None, "a single rank makes its own step inputs"
        assert self._rank != 0, "rank 0 makes the step inputs"
        frame = torch.empty(_FRAME, dtype=torch.uint8)
        dist.broadcast(frame, group_src=0, group=self._group)
        data = frame.numpy().tobytes()
        size = _HEADER + int.from_bytes(data[:_HEADER], "little")
        if size > _FRAME:
            rest = torch.empty(size - _FRAME, dtype=torch.uint8)
            dist.broadcast(rest, group_src=0, group=self._group)
            data += rest.numpy().tobytes()
        step_input = pickle.loads(data[_HEADER:size])
        assert isinstance(step_input, StepInput)
        return step_input
