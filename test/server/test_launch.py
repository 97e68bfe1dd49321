"""`equipoise serve` from its first line to its end: ready line, signals, a rank that is killed, nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from equipoise.config import HttpConfig
from equipoise.engine.processes import KILL_SECONDS, LEAVE_SECONDS
from equipoise.server.launch import is_loopback, print_ready

MARK = "EQUIPOISE_TEST_MARK"
SLACK_SECONDS = 6.0  # for a machine that is busy; 0.5 suffice on one that is not

needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes through /proc")


class Serving:
    """A server process with its output, and every process that it started."""

    def __init__(self, *arguments: object, python: tuple[str, ...] = ("-m", "equipoise")) -> None:
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, *python, "serve", "--port", "0", "--device", "cpu", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", MARK: self.mark},
            # A test run that a script started in the background ignores Ctrl-C, and so would what it starts.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )

    def wait_for_line(self, start: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(start):
                return line.strip()
        raise AssertionError(f"no line {start!r}; stderr: {self.process.stderr and self.process.stderr.read()}")

    def url(self) -> str:
        found = re.fullmatch(r"ready: .* on (http://127\.0\.0\.1:\d+)", self.wait_for_line("ready: "))
        assert found
        return found[1]

    def finish(self, with_signal: signal.Signals, within: float = 40) -> tuple[int, str]:
        """Exit code and stderr after the signal."""
        self.process.send_signal(with_signal)
        _, stderr = self.process.communicate(timeout=within)
        return self.process.returncode, stderr

    def pids(self) -> list[int]:
        """Every living process that inherited the mark: the server, its supervisor, the ranks."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z" and f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return sorted(found)

    def supervisor_pid(self) -> int:
        """The child of the server that runs its module."""
        return self._running_supervisor(below=self.process.pid)[0]

    def rank_pids(self) -> list[int]:
        """The supervisor's forks, in the order of their ranks."""
        return self._running_supervisor(below=self.supervisor_pid())

    def _running_supervisor(self, below: int) -> list[int]:
        module = b"equipoise.engine.supervisor"
        children = Path(f"/proc/{below}/task/{below}/children").read_text().split()
        return [int(pid) for pid in children if module in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def assert_nothing_is_left(self) -> None:
        deadline = time.monotonic() + 15
        while self.pids():
            assert time.monotonic() < deadline, f"left behind: {self.pids()}"
            time.sleep(0.1)


@contextmanager
def serving(*arguments: object, python: tuple[str, ...] = ("-m", "equipoise")) -> Iterator[Serving]:
    server = Serving(*arguments, python=python)
    try:
        yield server
    finally:
        for pid in server.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        server.process.communicate()


@needs_proc
def test_sigterm_ends_streams_and_leaves_nothing(tiny_model: Path) -> None:
    with serving("--model-path", tiny_model, "--ep-size", 2, "--max-model-len", 512) as server:
        url = server.url()
        assert server.wait_for_line("try: curl ").startswith(f"try: curl {url}/generate")
        assert len(server.pids()) >= 4  # the server, the supervisor, two ranks
        lines: list[str] = []
        first = threading.Event()

        def stream() -> None:
            # As many long answers as make them outlast the time that running requests are given.
            params = {"max_new_tokens": 500, "ignore_eos": True}
            body = {"text": ["a"] * 16, "stream": True, "sampling_params": params}
            with httpx.stream("POST", f"{url}/generate", json=body, timeout=60) as response:
                for line in response.iter_lines():
                    first.set()
                    lines.append(line)

        thread = threading.Thread(target=stream)
        thread.start()
        assert first.wait(30)
        code, stderr = server.finish(signal.SIGTERM)
        thread.join(10)
        assert not thread.is_alive()
        assert code == 0
        assert "Traceback" not in stderr
        assert "ERROR" not in stderr
        events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        last = json.loads(events[-2].removeprefix("data: "))
        assert last["meta_info"]["finish_reason"]["type"] in ("abort", "length")
        server.assert_nothing_is_left()


@needs_proc
def test_sigterm_answers_a_rebalance_that_is_under_way_with_503(tiny_model: Path) -> None:
    with serving("--model-path", tiny_model, "--ep-size", 2, "--drain-timeout", 1) as server:
        url = server.url()
        answers: list[httpx.Response] = []

        def rebalance() -> None:
            answers.append(httpx.post(f"{url}/eplb/rebalance", json={}, timeout=60))

        (held, *_) = reversed(server.rank_pids())
        os.kill(held, signal.SIGSTOP)  # so the rebalance cannot end before the signal comes
        thread = threading.Thread(target=rebalance)
        thread.start()
        thread.join(1)
        assert thread.is_alive(), answers
        signalled = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        thread.join(10)
        assert not thread.is_alive()
        assert time.monotonic() - signalled < 4, "the drain time is 1 s"
        os.kill(held, signal.SIGCONT)
        _, stderr = server.process.communicate(timeout=15)
        assert server.process.returncode == 0
        assert answers[0].headers["content-type"] == "application/json"
        assert (answers[0].status_code, answers[0].json()["error"]["type"]) == (503, "ShuttingDown")
        assert "Traceback" not in stderr
        assert "ERROR" not in stderr
        server.assert_nothing_is_left()


@needs_proc
@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_while_a_rank_stays_stopped_ends_it_too(tiny_model: Path, rank: int) -> None:
    with serving("--model-path", tiny_model, "--ep-size", 2, "--drain-timeout", 1) as server:
        url = server.url()
        os.kill(server.rank_pids()[rank], signal.SIGSTOP)
        answers: list[httpx.Response] = []
        body = {"text": "a", "sampling_params": {"max_new_tokens": 4}}
        thread = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/generate", json=body, timeout=60)), daemon=True
        )
        thread.start()
        thread.join(1)
        assert not answers
        draining = 1 + 1  # --drain-timeout, then as long for what was aborted
        code, stderr = server.finish(signal.SIGTERM, within=draining + LEAVE_SECONDS + SLACK_SECONDS)
        assert code == 0, stderr
        assert "ranks that have not left after 5 s are killed" in stderr
        assert "Traceback" not in stderr
        assert "ERROR" not in stderr
        server.assert_nothing_is_left()
        thread.join(5)
        assert answers[0].status_code == 503


@needs_proc
@pytest.mark.parametrize(
    ("stopped", "within"), [("a rank", LEAVE_SECONDS), ("the supervisor and all ranks", LEAVE_SECONDS + KILL_SECONDS)]
)
def test_sigterm_ends_an_idle_server_in_seconds_whatever_is_stopped(
    tiny_model: Path, stopped: str, within: float
) -> None:
    with serving("--model-path", tiny_model, "--ep-size", 2) as server:
        server.url()
        ranks = server.rank_pids()
        for pid in ranks[-1:] if stopped == "a rank" else (server.supervisor_pid(), *ranks):
            os.kill(pid, signal.SIGSTOP)
        code, stderr = server.finish(signal.SIGTERM, within=within + SLACK_SECONDS)
        assert code == 0, stderr
        assert "ranks that have not left after 5 s are killed" in stderr
        assert "Traceback" not in stderr
        server.assert_nothing_is_left()


# SIGTERM at the moment at which the event loop is made, or closed. An exception while it is made leaves half a loop,
# whose destructor prints a traceback; while it is closed it never did harm, and shall not.
SIGNALLED_IN_THE_EVENT_LOOP = """
import asyncio, os, runpy, signal

def signalled(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    return method(*arguments)

method = asyncio.SelectorEventLoop.{method}
asyncio.SelectorEventLoop.{method} = signalled
runpy.run_module("equipoise", run_name="__main__")
"""


@needs_proc
@pytest.mark.parametrize("method", ["__init__", "close"])
def test_sigterm_while_the_event_loop_is_made_or_closed_ends_the_server_as_ever(tiny_model: Path, method: str) -> None:
    program = SIGNALLED_IN_THE_EVENT_LOOP.format(method=method)
    with serving("--model-path", tiny_model, "--ep-size", 2, python=("-c", program)) as server:
        server.wait_for_line("try: curl ")
        if method == "close":
            server.process.send_signal(signal.SIGTERM)
        output, stderr = server.process.communicate(timeout=40)
        assert (server.process.returncode, output.splitlines()[-1]) == (0, "stopped"), stderr
        assert "Traceback" not in stderr
        server.assert_nothing_is_left()


@needs_proc
def test_a_killed_rank_ends_the_server_with_exit_code_1_in_seconds(tiny_model: Path) -> None:
    with serving("--model-path", tiny_model, "--ep-size", 2) as server:
        server.url()
        killed = time.monotonic()
        os.kill(server.rank_pids()[-1], signal.SIGKILL)
        _, stderr = server.process.communicate(timeout=30)
        assert server.process.returncode == 1
        assert time.monotonic() - killed < 10
        assert "rank 1 has died: killed by SIGKILL" in stderr
        assert "Traceback" not in stderr
        server.assert_nothing_is_left()


@needs_proc
def test_a_stopped_rank_shows_everywhere_at_once_and_ends_the_server_in_the_end(tiny_model: Path) -> None:
    flags = ("--ep-size", 2, "--health-timeout", 3, "--watchdog-timeout", 12)
    with serving("--model-path", tiny_model, *flags) as server:
        with httpx.Client(base_url=server.url(), timeout=20) as client:
            assert client.head("/health").status_code == client.get("/health_generate").status_code == 200
            assert client.get("/eplb/status").json()["error"] is None
            os.kill(server.rank_pids()[-1], signal.SIGSTOP)
            deadline = time.monotonic() + 10
            while (response := client.get("/health")).status_code == 200:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert (response.status_code, response.json()["error"]["type"]) == (503, "EngineSilent")
            began = time.monotonic()
            assert "no sign of life" in client.get("/eplb/status").json()["error"]
            metrics = client.get("/metrics").text
            assert time.monotonic() - began < 3, "answered from what is known"
            assert "equipoise_engine_silent_seconds" in metrics
            assert "equipoise_phase" in metrics, "the figures of balancing are still there"
        _, stderr = server.process.communicate(timeout=40)
        assert server.process.returncode == 1
        assert "--watchdog-timeout" in stderr
        server.assert_nothing_is_left()


@needs_proc
@pytest.mark.parametrize(
    ("with_signal", "code", "stderr"),
    [(signal.SIGINT, 130, "equipoise: interrupted\n"), (signal.SIGTERM, 0, "")],
)
def test_signal_while_loading(tiny_model: Path, with_signal: signal.Signals, code: int, stderr: str) -> None:
    with serving("--model-path", tiny_model, "--ep-size", 2) as server:
        server.wait_for_line("starting 2 ranks")
        assert server.finish(with_signal) == (code, stderr)
        server.assert_nothing_is_left()


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback


@pytest.mark.parametrize(
    ("http", "warns"),
    [
        (HttpConfig(), False),
        (HttpConfig(host="0.0.0.0"), True),
        (HttpConfig(host="0.0.0.0", api_key="secret"), True),
        (HttpConfig(host="0.0.0.0", admin_api_key="secret"), False),
    ],
)
def test_warning_where_strangers_can_rebalance(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, http: HttpConfig, warns: bool
) -> None:
    with caplog.at_level("WARNING", logger="equipoise.server"):
        print_ready(http, "m", Console(soft_wrap=True))
    captured = capsys.readouterr()
    assert ("without --admin-api-key" in caplog.text) == warns
    assert "secret" not in captured.out + captured.err
    assert "ready: m on http://127.0.0.1:30000" in captured.out
