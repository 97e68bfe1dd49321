"""serve(config): take the port, load the model, say when it is ready, and leave nothing behind."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import logging
import math
import os
import signal
import socket
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from rich.console import Console

from equipoise.config import HttpConfig, ServeConfig
from equipoise.engine.logs import configure_logging
from equipoise.errors import ConfigError
from equipoise.server.middleware import PatientH11, is_loopback

if TYPE_CHECKING:
    from fastapi import FastAPI

_log = logging.getLogger("equipoise.server")
_ABORT_SECONDS = 1.0  # that an engine may take to end what was aborted; uvicorn cuts it a second later

EXIT_ENGINE_DEAD = 1


class Terminated(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt, not for ``except Exception``."""


def serve(config: ServeConfig, console: Console | None = None) -> int:
    """Serve until a signal ends it, exit code 0, or the engine dies, exit code 1: a supervisor can start it anew.

    The port, the dump directory and the algorithm's name are looked at before anything is loaded; the engine looks at
    the other options before it reads weights.

    Raises:
        InvalidInputError: an option that cannot work; nothing is left running.
        KeyboardInterrupt: Ctrl-C, after the engine has been closed.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    configure_logging(config.engine.log_level, "server")
    config = dataclasses.replace(config, http=with_keys(config.http, os.environ))
    with sigterm_raises(), listening_socket(config.http) as listener:
        try:
            config = _with_port(config, listener.getsockname()[1])
            check_dump_dir(config.http.dump_dir)
            _check_algorithm(config.eplb.eplb_algorithm)
            return _serve_on(listener, config, console)
        except Terminated:
            console.print("stopped")
            return 0


def _check_algorithm(name: str) -> None:
    from equipoise.algorithms.registry import check_algorithm  # brings numba, which --help needs not wait for

    check_algorithm(name, field="eplb_algorithm")


def _serve_on(listener: socket.socket, config: ServeConfig, console: Console) -> int:
    # These bring torch: seconds, so not before what is quickly told has been told.
    from equipoise.engine.engine import Engine
    from equipoise.server.app import create_app

    def on_progress(line: str) -> None:
        if line != "ready":  # the engine is; the server says so below, with its address
            console.print(line, markup=False)

    engine = Engine.launch(config, on_progress=on_progress)
    try:
        app = create_app(engine, config)
        options = uvicorn.Config(
            app,
            http=PatientH11,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=math.ceil(config.http.drain_timeout) + 2,
        )
        print_ready(config.http, app.state.model_name, console)
        server = _DrainingServer(options, app, config.http.drain_timeout)
        server.run(sockets=[listener])
        if server.engine_died:
            _log.error("the server ends because the engine is dead: %s", engine.error)
            return EXIT_ENGINE_DEAD
    finally:
        engine.close()
    return 0


class _DrainingServer(uvicorn.Server):
    """Stop when the engine has died. After a signal, end what still runs with a last event or a 503, not by cutting it.

    Attributes:
        engine_died: whether that is why it stopped.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI, drain_timeout: float) -> None:
        super().__init__(config)
        self._state = app.state
        self._drain_timeout = drain_timeout
        self.engine_died = False

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve. A signal that arrives while the event loop is made or closed is raised when that is done."""
        with self.capture_signals():  # by itself uvicorn captures only what arrives while the loop runs
            super().run(sockets)

    async def on_tick(self, counter: int) -> bool:
        if self._state.engine.error is not None:
            self.engine_died = True
            return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        draining = asyncio.create_task(self._end_after_drain())
        await super().shutdown(sockets)
        draining.cancel()
        self._state.tokenizing.close()

    async def _end_after_drain(self) -> None:
        await asyncio.sleep(0 if self.engine_died else self._drain_timeout)
        self._state.control.close()
        await self._state.generator.abort_all()
        await asyncio.sleep(_ABORT_SECONDS)
        self._state.generator.give_up()


@contextmanager
def sigterm_raises() -> Generator[None]:
    """SIGTERM raises :class:`Terminated` in the main thread, so that ``finally`` blocks run."""

    def handler(_signal: int, _frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def listening_socket(http: HttpConfig) -> Generator[socket.socket]:
    """The port, taken before the model is loaded. Connections made meanwhile wait until it is.

    Raises:
        ConfigError: the host is unknown, or the port is taken or not ours to take.
    """
    where = f"{http.host}:{http.port}"
    try:
        family, _, _, _, address = socket.getaddrinfo(http.host, http.port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host {http.host!r} cannot be resolved: {error}", field="host") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(128)  # only a listening socket keeps a second server off the port
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(
                    f"port {http.port} is in use on {http.host}; give another --port", field="port"
                ) from None
            if error.errno == errno.EADDRNOTAVAIL:
                raise ConfigError(f"host {http.host!r} is not an address of this machine", field="host") from None
            raise ConfigError(f"cannot listen on {where}: {error.strerror}", field="port") from None
        yield listener
    finally:
        listener.close()


def with_keys(http: HttpConfig, environment: Mapping[str, str]) -> HttpConfig:
    """Read keys that are given as ``@FILE``, and take those that no flag gives from the environment.

    Raises:
        ConfigError: a file that cannot be read, or a key that is empty.
    """
    found: dict[str, Any] = {}
    for name in ("api_key", "admin_api_key"):
        key, variable = getattr(http, name), f"EQUIPOISE_{name.upper()}"
        if key is None and variable in environment:
            key = environment[variable]
            if not key.strip():
                raise ConfigError(f"${variable} is set, but empty", field=name)
        elif key is not None and key.startswith("@"):
            try:
                key = Path(key[1:]).read_text().partition("\n")[0].strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{name}: the file {key[1:]!r} cannot be read: {error}", field=name) from None
            if not key:
                raise ConfigError(f"{name}: the file has no key in its first line", field=name)
        found[name] = key
    return dataclasses.replace(http, **found)


def check_dump_dir(directory: str) -> None:
    """
    Raises:
        ConfigError: not a directory that this process can write to.
    """
    if not os.path.isdir(directory):
        raise ConfigError(f"dump_dir must be a directory that exists, got {directory!r}", field="dump_dir")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigError(f"dump_dir {directory!r} is not writable", field="dump_dir")


def print_ready(http: HttpConfig, model_name: str, console: Console) -> None:
    """One line with the URL, then what to try. A warning if strangers can rebalance."""
    if not is_loopback(http.host) and http.admin_api_key is None:
        _log.warning(
            "listening on %s without --admin-api-key: whoever reaches this port %scan rebalance and write dumps",
            http.host,
            "and has the API key " if http.api_key else "",
        )
    name = "127.0.0.1" if http.host in ("0.0.0.0", "::", "") else http.host
    url = f"http://{f'[{name}]' if ':' in name else name}:{http.port}"
    key = " -H 'Authorization: Bearer KEY'" if http.api_key else ""
    console.print(f"ready: {model_name} on {url}", markup=False)
    body = '{"text": "The", "sampling_params": {"max_new_tokens": 16}}'
    console.print(f"try: curl {url}/generate{key} -H 'Content-Type: application/json' -d '{body}'", markup=False)


def _with_port(config: ServeConfig, port: int) -> ServeConfig:
    return dataclasses.replace(config, http=dataclasses.replace(config.http, port=port))
