"""Starts, watches, talks to and ends the engine's processes, on the launcher's side.

Two pipes lead there. The pipe for requests reaches rank 0, and breaks when rank 0 is gone; the pipe for control reaches
the supervisor, which reports why a rank is gone, and breaks when the supervisor is.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

import equipoise
from equipoise.config import ServeConfig
from equipoise.engine.messages import Died, Ended, FromEngine, ToEngine
from equipoise.errors import EngineDeadError

LEAVE_SECONDS = 5.0
"""How long the ranks may take to leave on their own before the supervisor is told to kill them."""

KILL_SECONDS = 3.0
"""How long the supervisor may take to kill its ranks and end, before the launcher kills all of them itself."""

PING_SECONDS = 1.0
"""Between a sign of life and the next question for one."""


class Pulse:
    """Keep the time of the last sign of life. One thread writes, any may read.

    A sign of life is something that no rank can be missing from: tokens of a step, or the answer to a ``Ping``, which
    rank 0 gives once all ranks have met in a barrier between two steps. A rank that is stopped or hangs keeps the
    others waiting in a collective, so silence is all there is to notice.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._last = clock()
        self._asked = False

    @property
    def silent_seconds(self) -> float:
        """Since the last sign of life, less the pause that there is between two of an idle engine."""
        with self._lock:
            return max(0.0, self._clock() - self._last - PING_SECONDS)

    def beat(self) -> None:
        """Take note of a sign of life."""
        with self._lock:
            self._last, self._asked = self._clock(), False

    def wants_ping(self) -> bool:
        """Whether to ask now; True at most once until the next sign of life."""
        with self._lock:
            if self._asked or self._clock() - self._last < PING_SECONDS:
                return False
            self._asked = True
            return True


class EngineProcesses:
    """Start a supervisor process, which starts the ranks. One thread receives, any may send.

    Args:
        config: what the supervisor is told to serve.

    Attributes:
        supervisor: ends when its ranks have ended, and they when it has.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._requests, far_requests = Pipe()
        self._control, far_control = Pipe()
        self.supervisor = _start_supervisor(far_requests, far_control)
        far_requests.close()
        far_control.close()
        self._control.send(config)
        # A rank that is stopped reads no more, and a full pipe blocks its sender: never an event loop.
        self._outbox: queue.SimpleQueue[ToEngine | None] = queue.SimpleQueue()
        self._broken = False
        threading.Thread(target=self._write, name="engine-writer", daemon=True).start()

    def send(self, message: ToEngine) -> None:
        """Send to rank 0, without waiting for it.

        Raises:
            EngineDeadError: it is gone.
        """
        if self._broken:
            raise EngineDeadError("the engine has just died")
        self._outbox.put(message)

    def _write(self) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                self._requests.send(message)
        except OSError:
            self._broken = True

    def receive(self, timeout: float | None = None) -> list[FromEngine]:
        """Wait for the next messages, at most ``timeout`` seconds; a broken pipe of the supervisor is a death too."""
        messages: list[FromEngine] = []
        pipes = [self._control] if self._requests.closed else [self._control, self._requests]
        for ready in wait(pipes, timeout):
            assert isinstance(ready, Connection)
            try:
                messages.append(ready.recv())
            except (EOFError, OSError):
                if ready is self._control:
                    return [*messages, Died(None, "the supervisor process has ended")]
                # Rank 0 is gone: the supervisor says why.
                return [*messages, self._supervisor_report()]
        return messages

    def terminate(self) -> None:
        """Have the supervisor kill its ranks and end: for ranks that are starting, or do not leave."""
        self.supervisor.terminate()

    def await_end(self, ranks: Sequence[int]) -> None:
        """Wait until the supervisor has ended, at most ``KILL_SECONDS``; then kill the ranks and it.

        Args:
            ranks: their process ids.
        """
        try:
            self.supervisor.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            # It is stopped or hangs, so it has reaped none of its ranks: these ids are still theirs.
            for pid in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.supervisor.kill()
            self.supervisor.wait()

    def close(self) -> None:
        """Close the pipes, once nobody receives. May be called more than once."""
        self._control.close()
        self._outbox.put(None)
        self._requests.close()

    def _supervisor_report(self) -> Died | Ended:
        try:
            while True:
                message: FromEngine = self._control.recv()
                if isinstance(message, Died | Ended):
                    return message
        except (EOFError, OSError):
            return Died(None, "the supervisor process has ended")


def _start_supervisor(requests: Connection, control: Connection) -> subprocess.Popen[bytes]:
    """Hands the supervisor its ends of the pipes."""
    ends = (requests.fileno(), control.fileno())
    # This package from where it was imported here, and nothing that happens to lie in the current directory (-P).
    package_root = str(Path(equipoise.__file__).parents[1])
    search_path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    # A session of its own: a Ctrl-C in the terminal reaches the launcher, which then ends the ranks in order.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "equipoise.engine.supervisor", *map(str, ends)],
        pass_fds=ends,
        env={**os.environ, "PYTHONPATH": search_path},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
