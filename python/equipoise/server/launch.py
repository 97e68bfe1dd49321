"""serve(config): take the port, load the model, say when it is ready, and leave nothing behind."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from rich.console import Console

from equipoise.config import HttpConfig, ServeConfig
from equipoise.engine.logs import configure_logging
from equipoise.errors import ConfigError

if TYPE_CHECKING:
    from equipoise.server.generation import RequestGenerator

_log = logging.getLogger("equipoise.server")

DRAIN_SECONDS = 3.0
"""How long running requests may go on after a signal before they end with finish reason ``abort``."""


class Terminated(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt, not for ``except Exception``."""


def serve(config: ServeConfig, console: Console | None = None) -> int:
    """Serves until a signal ends it; returns the exit code of a clean end, 0.

    The port and the dump directory are looked at before anything is loaded; the engine looks at the other options
    before it reads weights.

    Raises:
        InvalidInputError: an option that cannot work; nothing is left running.
        KeyboardInterrupt: Ctrl-C, after the engine has been closed.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    configure_logging(config.engine.log_level, "server")
    with sigterm_raises(), listening_socket(config.http) as listener:
        try:
            config = _with_port(config, listener.getsockname()[1])
            check_dump_dir(config.http.dump_dir)
            return _serve_on(listener, config, console)
        except Terminated:
            console.print("stopped")
            return 0


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
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=int(DRAIN_SECONDS) + 5
        )
        print_ready(config.http, app.state.model_name, console)
        _DrainingServer(options, app.state.generator).run(sockets=[listener])
    finally:
        engine.close()
    return 0


class _DrainingServer(uvicorn.Server):
    """Ends what still streams a while after the signal, with a last event, rather than cutting connections."""

    def __init__(self, config: uvicorn.Config, generator: RequestGenerator) -> None:
        super().__init__(config)
        self._generator = generator

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        draining = asyncio.create_task(self._abort_after_drain())
        await super().shutdown(sockets)
        draining.cancel()

    async def _abort_after_drain(self) -> None:
        await asyncio.sleep(DRAIN_SECONDS)
        await self._generator.abort_all()


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


def check_dump_dir(directory: str) -> None:
    """
    Raises:
        ConfigError: not a directory that this process can write to.
    """
    if not os.path.isdir(directory):
        raise ConfigError(f"dump_dir must be a directory that exists, got {directory!r}", field="dump_dir")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigError(f"dump_dir {directory!r} is not writable", field="dump_dir")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``; False if that cannot be told."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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
