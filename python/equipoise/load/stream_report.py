"""What became of the steps of a streamed recording; torch is not needed to read it."""

from __future__ import annotations

from dataclasses import dataclass

from equipoise.config import StreamMode

MAX_RANGES = 16
"""Ranges of dropped steps that are told apart; the last one then reaches to the newest dropped step."""


@dataclass(frozen=True)
class StreamReport:
    """What became of the steps of one rank, so far."""

    path: str
    num_steps: int  # taken: to be written
    num_written: int
    num_dropped: int
    dropped: list[list[int]]  # [first, last] forward pass ids; see MAX_RANGES
    finished: bool  # stopped, all that was taken is written, the file is closed
    error: str | None  # why steps are dropped, where it is not the speed of the disk


@dataclass(frozen=True)
class StreamReply:
    path: str  # of the folder, absolute; each rank's file is in the folder of its own machine
    mode: StreamMode
    finished: bool  # it was stopped, and every rank has written what it took
    ranks: list[StreamReport]


@dataclass(frozen=True)
class RecordingReply:
    recording: bool  # one runs
    stream: StreamReply | None  # the streamed recording begun last, if the last one was streamed


class DroppedSteps:
    """How many steps are missing, and which."""

    def __init__(self) -> None:
        self.count = 0
        self.ranges: list[list[int]] = []
        self._in_range = False

    def add(self, forward_pass_id: int) -> None:
        self.count += 1
        if self.ranges and (self._in_range or len(self.ranges) == MAX_RANGES):
            self.ranges[-1][1] = forward_pass_id
        else:
            self.ranges.append([forward_pass_id, forward_pass_id])
        self._in_range = True

    def end_range(self) -> None:
        """A step was taken."""
        self._in_range = False
