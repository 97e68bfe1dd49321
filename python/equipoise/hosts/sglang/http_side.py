"""The plugin in the process that serves HTTP: the operator's routes on SGLang's own server, under its keys."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from equipoise.admin.routes import Control, admin_router
from equipoise.hosts.sglang.command_channel import CommandChannel
from equipoise.hosts.sglang.hook_targets import Hook, HookTarget
from equipoise.manager.commands import ExpertLocationReply, GetExpertLocation

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
    add_initial_location(router, channel.control, lambda: _num_layers(tokenizer_manager))
    for route in router.routes:
        # SGLang has routes of its own for recording, which stay.
        if not route.path.startswith("/eplb/"):  # type: ignore[attr-defined]
            continue
        # What SGLang's middleware reads: open without keys, else the API key or the admin key.
        route.endpoint._auth_level = AuthLevel.ADMIN_OPTIONAL  # type: ignore[attr-defined]
        server.app.router.routes.append(route)
    log.info("operator's routes under /eplb")


def add_initial_location(router: APIRouter, control: Control, num_layers: Callable[[], int]) -> None:
    """``GET /eplb/init_expert_location``, for SGLang's ``--init-expert-location``.

    Args:
        num_layers: of the model, dense ones included.
    """

    @router.get("/eplb/init_expert_location")
    async def init_expert_location() -> JSONResponse:
        """The live placement as a file that SGLang starts with."""
        return JSONResponse(initial_location(await control(GetExpertLocation()), num_layers()))


def initial_location(live: ExpertLocationReply, num_layers: int) -> dict[str, list[list[int]]]:
    """What SGLang reads: no key but the map, with a row for every layer; what a dense layer's says is never used."""
    num_slots = live.num_ranks * live.slots_per_rank
    rows = [[slot % live.num_logical_experts for slot in range(num_slots)] for _ in range(num_layers)]
    for layer_id, row in zip(live.layer_ids, live.physical_to_logical_map, strict=True):
        rows[layer_id] = row
    return {"physical_to_logical_map": rows}


def _num_layers(tokenizer_manager: Any) -> int:
    from sglang.srt.eplb.expert_location import ModelConfigForExpertLocation

    return int(ModelConfigForExpertLocation.from_model_config(tokenizer_manager.model_config).num_layers)
