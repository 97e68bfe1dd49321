"""Orders staging and commits on a device: the stream of transfers, and its thread's device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch


class SideStream:
    """A CUDA stream on which staging is overlapped with forward passes; on a CPU it does nothing.

    Staging waits for the last commit, which read the staging slots and wrote the live ones. A commit runs on the
    caller's stream after staging has finished, so the caller's stream must be the one its forward passes run on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last_commit: torch.cuda.Event | None = None
        if self._stream is not None:  # what was made before on the caller's stream, canaries among it, is there
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def bind_thread(self) -> None:
        """Makes the device current for this thread; called first by a thread that stages.

        The current device is each thread's own and starts at 0. Left there, leaving the stream's context would make a
        context on GPU 0, half a gigabyte of it for every other rank of the machine.
        """
        if self._stream is not None:
            torch.cuda.set_device(self._device)

    def overlapped(self) -> AbstractContextManager[object]:
        """A context in which work is queued on the side stream, behind the last commit."""
        if self._stream is None:
            return nullcontext()
        assert torch.cuda.current_device() == self._stream.device_index, (
            f"this thread's current device is {torch.cuda.current_device()}, the weights lie on {self._device}: "
            "call torch.cuda.set_device first"
        )
        if self._last_commit is not None:
            self._stream.wait_event(self._last_commit)
        return torch.cuda.stream(self._stream)

    def finish(self) -> None:
        """Returns once all that was queued on the side stream is done."""
        if self._stream is not None:
            self._stream.synchronize()

    def begin_commit(self, clock: Callable[[], float]) -> CommitTimer:
        """Marks the begin of a commit on the caller's stream; ``clock`` tells seconds where there is none."""
        return CommitTimer(clock) if self._stream is None else CommitTimer()

    def committed(self, timer: CommitTimer) -> None:
        """Marks the end of a commit on the caller's stream."""
        self._last_commit = timer.stop()


class CommitTimer:
    """Measures a commit where it happens: a GPU's by events, for the host only queues it; a CPU's by ``clock``."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self._clock = clock
        self._begin = self._end = 0.0
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if clock is not None:
            self._begin = clock()
        else:
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record()

    def stop(self) -> torch.cuda.Event | None:
        """Ends the time; returns the event that marks it, None where a clock measures."""
        if self._clock is not None:
            self._end = self._clock()
        if self._events is None:
            return None
        self._events[1].record()
        return self._events[1]

    def seconds(self) -> float | None:
        """Seconds on the device, without a wait for it; None: it has not come to the end yet."""
        if self._events is None:
            return self._end - self._begin
        begin, end = self._events
        return 1e-3 * begin.elapsed_time(end) if end.query() else None
