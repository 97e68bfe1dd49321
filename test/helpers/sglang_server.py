"""The real SGLang server on this machine's CPU, in the environment that ``make test-sglang`` builds."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-sglang/bin/python"
SHIMS = ROOT / "test/hosts/sglang/shims"
CPU_PLUGIN = "sglang_cpu"  # in SHIMS: repairs SGLang's CPU path

CPU_FLAGS = (
    "--device=cpu",
    "--attention-backend=torch_native",
    "--dtype=float32",
    "--max-total-tokens=4096",
    "--max-running-requests=16",
    "--disable-cuda-graph",
    "--disable-radix-cache",
    "--random-seed=0",
    "--watchdog-timeout=900",
)
NUM_PROMPTS = 20
Answers = list[list[int]]


class SglangServer:
    """A server process and a client of it; use as a context manager.

    Args:
        model: directory of the model.
        flags: SGLang's, beyond those that a CPU needs.
        plugins: names for ``SGLANG_PLUGINS``; the CPU plugin comes with them.
        environment: further variables.
        log: file for what the server writes.
        start_timeout: seconds until it must answer; a busy machine takes minutes.
    """

    def __init__(
        self,
        model: Path,
        flags: Sequence[str] = (),
        *,
        log: Path,
        plugins: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        start_timeout: float = 900,
    ) -> None:
        self.log = log
        self._port = _free_port()
        num_ranks = _value_of("--tp", flags)
        command = [str(PYTHON), "-m", "sglang.launch_server", f"--model-path={model}", f"--port={self._port}"]
        self._command = [*command, *CPU_FLAGS, *flags]
        self._environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT / 'python'}:{SHIMS}",
            "SGLANG_PLUGINS": ",".join((CPU_PLUGIN, *plugins)),
            "SGLANG_USE_CPU_ENGINE": "1",
            "SGLANG_CPU_OMP_THREADS_BIND": "|".join(str(rank % (os.cpu_count() or 1)) for rank in range(num_ranks)),
            "OMP_NUM_THREADS": "1",
            **(environment or {}),
        }
        self._start_timeout = start_timeout
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self._port}", timeout=300)

    def __enter__(self) -> SglangServer:
        self.process = subprocess.Popen(
            self._command,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            env=self._environment,
            start_new_session=True,
        )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends every process of the server."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.client.close()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._start_timeout
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if self.client.get("/health", timeout=30).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        raise RuntimeError(f"SGLang did not start; the end of {self.log}:\n" + "\n".join(self.lines()[-40:]))

    def lines(self) -> list[str]:
        """What the server has written so far."""
        return self.log.read_text(errors="replace").splitlines()

    def generate(self, prompt: Sequence[int], *, tokens: int = 8) -> list[int]:
        """The greedy continuation of a prompt."""
        sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        reply = self.client.post("/generate", json={"input_ids": list(prompt), "sampling_params": sampling})
        reply.raise_for_status()
        return reply.json()["output_ids"]

    def answers(self, *, concurrency: int = 1) -> Answers:
        """The greedy continuations of the prompts of :func:`prompts`, in order."""
        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(self.generate, prompts()))

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body)

    def get(self, path: str) -> httpx.Response:
        return self.client.get(path)


def prompts() -> list[list[int]]:
    """Prompts of 12 byte tokens each, the same in every run."""
    return [[(seed * 37 + position * 11) % 250 for position in range(12)] for seed in range(NUM_PROMPTS)]


def scheduler_pids(server: SglangServer) -> list[int]:
    """Processes of the server's group that run a scheduler, by rank."""
    listed = subprocess.run(["ps", "-eo", "pid=,pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    found = []
    for line in listed.splitlines():
        pid, group, state, title = line.split(None, 3)
        if int(group) == server.process.pid and "sglang::scheduler" in title and not state.startswith("Z"):
            found.append((title, int(pid)))
    return [pid for _, pid in sorted(found)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _value_of(flag: str, flags: Sequence[str]) -> int:
    return next((int(given.split("=")[1]) for given in flags if given.startswith(f"{flag}=")), 1)
