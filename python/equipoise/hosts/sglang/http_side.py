"""The plugin in the process that serves HTTP: the operator's routes on SGLang's own server, under its keys."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from equipoise.admin.routes import admin_router
from equipoise.hosts.sglang.command_channel import CommandChannel
from equipoise.hosts.sglang.hook_targets import Hook, HookTarget

log = logging.getLogger("equipoise.hosts.sglang")

_DUMP_DIR_VARIABLE = "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"


def http_hook() -> Hook:
    target = HookTarget("managers.tokenizer_control_mixin.TokenizerControlMixin.init_communicators")
    return Hook(target, "AFTER", add_routes)


def add_routes(_result: Any, tokenizer_manager: Any) -> None:
    """Mounts ``/eplb/...`` once SGLang has made its tokenizer manager.

    Not at load: the HTTP server's module is imported after the plugins were. Where it never is (the Python ``Engine``,
    gRPC), there are no routes, and rebalances are periodic alone.
    """
    from sglang.srt.utils.auth import AuthLevel

    channel = CommandChannel(tokenizer_manager)
    server = sys.modules.get("sglang.srt.entrypoints.http_server")
    if server is None:
        return
    router = admin_router(channel.control, dump_dir=os.environ.get(_DUMP_DIR_VARIABLE, "/tmp"))
    for route in router.routes:
        # SGLang has routes of its own for recording, which stay.
        if not route.path.startswith("/eplb/"):  # type: ignore[attr-defined]
            continue
        # What SGLang's middleware reads: open without keys, else the API key or the admin key.
        route.endpoint._auth_level = AuthLevel.ADMIN_OPTIONAL  # type: ignore[attr-defined]
        server.app.router.routes.append(route)
    log.info("operator's routes under /eplb")
