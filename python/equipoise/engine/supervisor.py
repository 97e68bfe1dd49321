"""The process between the launcher and the ranks: imports torch once, forks the ranks, ends all when one dies.

Run as ``python -m equipoise.engine.supervisor FD FD``: the inherited ends of a pipe for requests (handed on to rank 0)
and of one for the supervisor itself, whose first message is the ServeConfig. The ranks end with the supervisor, and
the supervisor with the launcher: each holds the end of a pipe that breaks when the one above it is gone.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import tempfile
import threading
import traceback
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

from equipoise.config import ServeConfig
from equipoise.engine.messages import Died, Ended, FromEngine, Started
from equipoise.errors import EquipoiseError

_GATHER_SECONDS = 0.5
"""After the first report of a failure, how long the others' are awaited: the first may be a mere consequence."""


def main() -> None:
    requests, control = (Connection(int(fd)) for fd in sys.argv[1:3])
    try:
        config = control.recv()
    except EOFError:
        return
    with tempfile.TemporaryDirectory(prefix="equipoise-") as rendezvous:
        supervise(config, requests, control, Path(rendezvous))


def supervise(config: ServeConfig, requests: Connection, control: Connection, rendezvous: Path) -> None:
    """Starts the ranks and stays until they have ended."""
    try:
        # The heavy imports of all ranks happen here, once.
        from equipoise.engine.blueprint import ModelBlueprint
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
            for connection in (control, report_read, *reports):
                connection.close()
            os.close(lifeline_write)
            if rank != 0:
                requests.close()
            _end_with(lifeline_read)
            _leave(
                report_write,
                lambda rank=rank: serve_rank(  # type: ignore[misc]
                    config, blueprint, rank, rendezvous, requests if rank == 0 else None
                ),
            )
        report_write.close()
        pids.append(pid)
        reports.append(report_read)
    requests.close()
    os.close(lifeline_read)
    _tell(control, Started(tuple(pids)))
    _watch(pids, reports, control)


def _watch(pids: list[int], reports: list[Connection], control: Connection) -> None:
    """Until all ranks have left, one has died, or the launcher is gone."""
    open_reports = dict(zip(reports, range(len(pids)), strict=True))
    failures: dict[int, BaseException | str] = {}
    try:
        while open_reports and not failures:
            for ready in wait([control, *open_reports]):
                if ready is control:
                    return
                assert isinstance(ready, Connection)
                _take_report(ready, open_reports.pop(ready), pids, failures)
        if not failures:
            _tell(control, Ended())
            return
        for late in wait(list(open_reports), timeout=_GATHER_SECONDS):
            assert isinstance(late, Connection)
            _take_report(late, open_reports.pop(late), pids, failures)
        ours = {rank: error for rank, error in failures.items() if isinstance(error, EquipoiseError)}
        rank, error = next(iter((ours or failures).items()))
        reason = error if isinstance(error, str) else _line(error)
        _tell(control, Died(rank, reason, error if isinstance(error, EquipoiseError) else None))
    finally:
        _end(pids, set(open_reports.values()))


def _take_report(report: Connection, rank: int, pids: list[int], failures: dict[int, BaseException | str]) -> None:
    """What a rank said last; a rank that broke off without a word died."""
    try:
        outcome = report.recv()
    except (EOFError, OSError):
        outcome = None
    report.close()
    _, status = os.waitpid(pids[rank], 0)
    if outcome is None:
        code = os.waitstatus_to_exitcode(status)
        failures[rank] = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    elif outcome != "":
        failures[rank] = outcome


def _end(pids: list[int], ranks: set[int]) -> None:
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[rank], signal.SIGKILL)
    for rank in ranks:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pids[rank], 0)


def _leave(report: Connection, serve: object) -> None:
    """Runs a rank in the forked process and ends it without coming back into the supervisor's code."""
    outcome: BaseException | str = ""
    try:
        serve()  # type: ignore[operator]
    except EquipoiseError as error:
        outcome = error
    except BaseException as error:
        traceback.print_exc()
        outcome = _line(error)
    code = 0 if outcome == "" else 1
    try:
        report.send_bytes(_pickled(outcome))
    except OSError:
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _pickled(outcome: BaseException | str) -> bytes:
    try:
        return pickle.dumps(outcome)
    except Exception:
        return pickle.dumps(str(outcome))


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
