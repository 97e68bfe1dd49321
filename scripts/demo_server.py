"""The demo's server process and the traffic it is sent: a real `equipoise serve` and a real HTTP client."""

from __future__ import annotations

import asyncio
import itertools
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

START_TIMEOUT_SECONDS = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """`equipoise serve` as a child process, ended when the block ends."""

    def __init__(self, options: list[str], on_line: Callable[[str], None]) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = ["equipoise", "serve", *options, "--port", str(self.port)]
        self._on_line = on_line
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Server:
        executable = str(Path(sys.executable).parent / "equipoise")
        self._process = subprocess.Popen(
            [executable, *self.command[1:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self._process.stdout is not None
        seen: list[str] = []
        for line in self._process.stdout:
            seen.append(line.rstrip())
            if line.startswith("ready:"):
                # Somebody must go on reading, or the server would one day wait for room in the pipe.
                threading.Thread(target=self._process.stdout.read, daemon=True).start()
                return self
            self._on_line(line.rstrip())
        self._process.wait()
        raise SystemExit("the server did not start:\n" + "\n".join(seen))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()


class Traffic:
    """A few clients that stream greedy answers to the prompts of one topic, until told otherwise.

    ``answers`` keeps every finished answer: (prompt, token ids). None is dropped, so a wrong one cannot hide.
    """

    def __init__(self, url: str, prompts: dict[str, list[str]], *, clients: int, max_new_tokens: int) -> None:
        self.answers: list[tuple[str, tuple[int, ...]]] = []
        self.last_text = ""
        self._url = url
        self._clients = clients
        self._max_new_tokens = max_new_tokens
        self._order = {
            topic: itertools.cycle(random.Random(0).sample(texts, len(texts))) for topic, texts in prompts.items()
        }
        self._topic: str | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, topic: str) -> None:
        """Sends this topic from now on; answers under way finish."""
        self._topic = topic
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._client()) for _ in range(self._clients)]

    async def stop(self) -> None:
        """Waits for the answers under way; raises what a client ran into."""
        self._topic = None
        await asyncio.gather(*self._tasks)
        self._tasks = []

    async def _client(self) -> None:
        async with httpx.AsyncClient(base_url=self._url, timeout=60.0) as http:
            while self._topic is not None:
                prompt = next(self._order[self._topic])
                await self._ask(http, prompt)

    async def _ask(self, http: httpx.AsyncClient, prompt: str) -> None:
        body = {
            "text": prompt,
            "stream": True,
            "sampling_params": {"temperature": 0, "max_new_tokens": self._max_new_tokens},
        }
        last: dict[str, Any] = {}
        async with http.stream("POST", "/generate", json=body) as response:
            if response.status_code != 200:
                raise RuntimeError(f"/generate answered {response.status_code}: {(await response.aread()).decode()}")
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    last = httpx.Response(200, content=line[6:]).json()
                    if "error" in last:
                        raise RuntimeError(f"/generate failed in the stream: {last['error']}")
        self.last_text = prompt[-40:] + "▸" + last["text"]
        self.answers.append((prompt, tuple(last["output_ids"])))
