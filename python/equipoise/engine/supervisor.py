"""The process between the launcher and the ranks: imports torch once, forks the ranks, ends all when one dies.

Run as ``python -m equipoise.engine.supervisor FD FD``: the inherited ends of a pipe for requests (handed on to rank 0)
and of one for the supervisor itself, whose first message is the ServeConfig. The ranks end with the supervisor, and
the supervisor with the launcher: each holds the end of a pipe that breaks when the one above it is gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import NoReturn

from equipoise.config import ServeConfig
from equipoise.engine.logs import configure_logging
from equipoise.engine.messages import Died, Ended, FromEngine, Started
from equipoise.errors import EquipoiseError

_log = logging.getLogger("equipoise.engine")

_GATHER_SECONDS = 0.5
"""After the first report of a failure, how long the others' are awaited: the first may be a mere consequence."""


def main() -> None:
    # A launcher that will not wait for ranks that start, or do not leave, says so: kill them, clean up and go.
    signal.signal(signal.SIGTERM, lambda _signal, _frame: sys.exit(1))
    requests, control = (Connection(int(fd)) for fd in sys.argv[1:3])
    try:
        config = control.recv()
    except EOFError:
        return
    configure_logging(config.engine.log_level, "supervisor")
    # Asked for GPUs without this, torch starts CUDA, which no forked rank can use then.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    code = 0
    try:
        with tempfile.TemporaryDirectory(prefix="equipoise-") as rendezvous:
            supervise(config, requests, control, Path(rendezvous))
    except SystemExit:
        code = 1
    sys.stderr.flush()
    os._exit(code)  # nothing is left to do; taking torch down in order would take seconds


def supervise(config: ServeConfig, requests: Connection, control: Connection, rendezvous: Path) -> None:
    """Fork the ranks and stay until they have ended."""
    try:
        # The heavy imports of all ranks happen here, once.
        from equipoise.engine.model.blueprint import ModelBlueprint
        from equipoise.engine.worker import serve_rank

        blueprint = ModelBlueprint.prepare(config)
    except Exception as error:
        _tell(control, Died(None, _line(error), error if isinstance(error, EquipoiseError) else None))
        return
    lifeline_read, lifeline_write = os.pipe()
    pids: list[int] = []
    reports: list[Connection] = []
    for rank in range(config.engine.ep_size):
        report_read, report_write = Pipe(duplex=False)
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            for connection in (control, report_read, *reports):
                connection.close()
            os.close(lifeline_write)
            if rank != 0:
                requests.close()
            configure_logging(config.engine.log_level, f"rank {rank}", rank)
            _end_with(lifeline_read)
            serve = partial(serve_rank, config, blueprint, rank, rendezvous, requests if rank == 0 else None)
            _leave(report_write, serve)
        report_write.close()
        pids.append(pid)
        reports.append(report_read)
    requests.close()
    os.close(lifeline_read)
    _tell(control, Started(tuple(pids)))
    _watch(pids, reports, control)


@dataclass(frozen=True)
class _Failure:
    """How a rank ended that should not have."""

    reason: str  # one line
    error: EquipoiseError | None = None  # what it raised, if it was one of ours
    traceback: str = ""
    silent: bool = False  # it was killed, or exited without a report

    @property
    def order(self) -> int:
        """Rank of likelihood that this failure caused the others: our errors and sudden deaths before the rest."""
        return 0 if self.error is not None else 1 if self.silent else 2


def _watch(pids: list[int], reports: list[Connection], control: Connection) -> None:
    """Wait until all ranks have ended, one has failed, or the launcher is gone; end what is left."""
    open_reports = dict(zip(reports, range(len(pids)), strict=True))
    failures: dict[int, _Failure] = {}
    deadline: float | None = None
    try:
        while open_reports and (deadline is None or time.monotonic() < deadline):
            timeout = None if deadline is None else deadline - time.monotonic()
            for ready in wait([control, *open_reports], timeout=timeout):
                if ready is control:
                    return
                assert isinstance(ready, Connection)
                rank = open_reports.pop(ready)
                failure = _exit_report(ready, pids[rank])
                if failure is not None:
                    failures[rank] = failure
                    deadline = deadline or time.monotonic() + _GATHER_SECONDS
        if not failures:
            _tell(control, Ended())
            return
        rank, failure = min(failures.items(), key=lambda item: item[1].order)
        if failure.error is None and failure.traceback:
            _log.error("rank %d failed:\n%s", rank, failure.traceback, extra={"rank": rank})
        _tell(control, Died(rank, failure.reason, failure.error))
    finally:
        _end(pids, set(open_reports.values()))


def _exit_report(report: Connection, pid: int) -> _Failure | None:
    """Reap a rank that has ended and read its report; None if it stopped as asked."""
    try:
        failure: _Failure | None = report.recv()
        reported = True
    except (EOFError, OSError):
        failure, reported = None, False
    report.close()
    _, status = os.waitpid(pid, 0)
    if reported:
        return failure
    code = os.waitstatus_to_exitcode(status)
    reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return _Failure(reason, silent=True)


def _end(pids: list[int], ranks: set[int]) -> None:
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[rank], signal.SIGKILL)
    for rank in ranks:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pids[rank], 0)


def _leave(report: Connection, serve: Callable[[], None]) -> NoReturn:
    """Runs a rank in the forked process and ends it without coming back into the supervisor's code."""
    failure: _Failure | None = None
    try:
        serve()
    except BaseException as error:
        failure = _Failure(_line(error), error if isinstance(error, EquipoiseError) else None, traceback.format_exc())
    with contextlib.suppress(OSError):
        report.send(failure)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if failure is None else 1)


def _end_with(lifeline: int) -> None:
    """Ends this process when the other end of ``lifeline`` is closed: the supervisor is gone."""

    def watch() -> None:
        os.read(lifeline, 1)
        os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def _tell(control: Connection, message: FromEngine) -> None:
    with contextlib.suppress(OSError):
        control.send(message)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, EquipoiseError) else f"{type(error).__name__}: {text[:300]}"


if __name__ == "__main__":
    main()
