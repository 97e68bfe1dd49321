"""StepWriter: hands the steps of a recording to a sink in a background thread, and says which it could not take.

The serving thread queues what a step left in a buffer, and never waits; the writer thread takes all that is queued,
waits for its copies, hands it to the sink and frees the buffers. The two share Python's interpreter lock, so the writer
works seldom and on many steps at once. Nothing here is collective.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch

from equipoise.formats.raw_trace import PHASE_NAMES, StepPhase
from equipoise.load.stream_report import DroppedSteps, StreamReport

_WRITE_SECONDS = 0.1  # between two looks of the writer, unless it is woken
_log = logging.getLogger("equipoise.load")


class StepSink(Protocol):
    """Where the steps go. Called by the writer thread alone, and may take its time."""

    path: str

    def append(
        self, values: np.ndarray, *, forward_pass_ids: np.ndarray, phases: np.ndarray, timestamps: np.ndarray
    ) -> None:
        """Takes records of some steps, as ``TraceWriter.append`` does; for phases see raw_trace.PHASE_NAMES."""
        ...

    def close(self, report: StreamReport) -> None:
        """Ends, after the last step."""
        ...


class StagedStep(NamedTuple):
    place: int  # of its buffer
    num_records: int
    copied: torch.cuda.Event | None  # None on a CPU: what it counts is there
    forward_pass_id: int
    phase: int
    timestamp: float


class StepWriter(ABC):
    """A recording that runs from its construction to :meth:`stop`; what of a step is recorded, a subclass says.

    Args:
        sink: takes what is written, in order; closed at the end.
        max_records: records taken at most; later steps are dropped.
        wake_at: queued records at which the writer does not wait any longer.
        device: of the counts.
        wall_clock: seconds since the epoch.
    """

    def __init__(
        self,
        sink: StepSink,
        *,
        max_records: int,
        wake_at: int,
        device: torch.device,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._sink = sink
        self._max_records = max_records
        self._wake_at = max(1, wake_at)
        self._on_gpu = device.type == "cuda"
        self._wall_clock = wall_clock
        self._staged: deque[StagedStep] = deque()
        self._queued_records = 0  # since the writer was woken last
        self._wake = threading.Event()
        self._dropped, self._lost = DroppedSteps(), DroppedSteps()  # by the serving thread; by the writer
        self._num_steps = self._num_records = self._num_written = 0
        self._error: str | None = None
        self._sink_failed = self._finished = False
        self.running = True
        self._thread = threading.Thread(target=self._write, name="equipoise-step-writer", daemon=True)
        self._thread.start()

    def record_tokens(self, layer_id: int, topk_ids: torch.Tensor) -> None:  # noqa: B027 - most record no tokens
        """Takes (T, K) logical experts of this rank's tokens in a layer of the step under way."""

    @abstractmethod
    def add(
        self,
        physical: torch.Tensor,
        physical_to_logical_map: torch.Tensor,
        /,
        forward_pass_id: int,
        phase: StepPhase | None,
    ) -> None:
        """Takes a step, or drops it; never waits.

        Args:
            physical: (L, P) int32 counts of this rank, on the device.
            physical_to_logical_map: (L, P) int64, the map that was live.
        """

    def discard(self) -> None:  # noqa: B027 - counts keep nothing before the end of a step
        """Forgets the step under way, which does not count."""

    @abstractmethod
    def _values(self, steps: list[StagedStep]) -> np.ndarray:
        """The records of some steps: on the writer thread, once their copies are there."""

    @abstractmethod
    def _release(self, steps: list[StagedStep]) -> None:
        """Frees the buffers of some steps: on the writer thread."""

    def stop(self) -> None:
        """Ends the recording; what was taken is still written, and the sink closed. Never waits."""
        self.running = False
        self._wake.set()

    def join(self, timeout: float) -> None:
        """Waits for the writer, after :meth:`stop`, at most ``timeout`` seconds."""
        self._thread.join(timeout)

    def report(self) -> StreamReport:
        """What became of the steps so far."""
        return StreamReport(
            path=self._sink.path,
            num_steps=self._num_steps,
            num_written=self._num_written,
            num_dropped=self._dropped.count + self._lost.count,
            dropped=[list(part) for part in (*self._lost.ranges, *self._dropped.ranges)],
            finished=self._finished,
            error=self._error,
        )

    # For subclasses, on the serving thread --------------------------------------------------------------------------

    def _has_room(self, num_records: int) -> bool:
        """Whether the file takes so many records more."""
        if self._num_records + num_records > self._max_records and self._error is None:
            self._error = f"the file may hold {self._max_records} records, and does"
        return self._error is None

    def _drop(self, forward_pass_id: int) -> None:
        self._dropped.add(forward_pass_id)

    def _queue(
        self,
        place: int,
        num_records: int,
        copied: torch.cuda.Event | None,
        forward_pass_id: int,
        phase: StepPhase | None,
    ) -> None:
        self._dropped.end_range()
        self._num_steps += 1
        self._num_records += num_records
        self._queued_records += num_records
        number = 0 if phase is None else PHASE_NAMES.index(phase)
        self._staged.append(StagedStep(place, num_records, copied, forward_pass_id, number, self._wall_clock()))
        if self._queued_records >= self._wake_at:
            self._queued_records = 0
            self._wake.set()

    # The writer thread ----------------------------------------------------------------------------------------------

    def _write(self) -> None:
        while self.running or self._staged:
            self._wake.wait(_WRITE_SECONDS)
            self._wake.clear()
            steps = [self._staged.popleft() for _ in range(len(self._staged))]
            if steps and not self._append(steps):
                for step in steps:
                    self._lost.add(step.forward_pass_id)
            self._release(steps)
        try:
            self._sink.close(self.report())
        except Exception as error:
            self._fail(error)
        self._finished = True

    def _append(self, steps: list[StagedStep]) -> bool:
        """Whether the sink has taken the steps. After its first failure it gets no more: half a step may lie there."""
        if self._sink_failed:
            return False
        sizes = [step.num_records for step in steps]
        try:
            if steps[-1].copied is not None:
                steps[-1].copied.synchronize()  # copies come in order
            self._sink.append(
                self._values(steps),
                forward_pass_ids=np.repeat([step.forward_pass_id for step in steps], sizes),
                phases=np.repeat([step.phase for step in steps], sizes),
                timestamps=np.repeat([step.timestamp for step in steps], sizes),
            )
        except Exception as error:
            self._fail(error)
            return False
        self._num_written += len(steps)
        return True

    def _fail(self, error: Exception) -> None:
        self._sink_failed = True
        _log.error("the recording %s cannot be written any more", self._sink.path, exc_info=error)
        self._error = self._error or f"{type(error).__name__}: {error}"
