"""Stops a launch that cannot work with one line: once SGLang has resolved its arguments, before any process starts."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from equipoise.hosts.sglang.hook_targets import Hook, HookTarget
from equipoise.hosts.sglang.launch.check import check_launch
from equipoise.hosts.sglang.launch.findings import Launch
from equipoise.hosts.sglang.launch.flags import LaunchFlags
from equipoise.hosts.sglang.launch.placement_check import count_experts
from equipoise.hosts.sglang.launch.settings import Level

log = logging.getLogger("equipoise.hosts.sglang")


def launch_guard_hook(level: Level) -> Hook:
    def resolve_and_check(original: Callable[..., None], server_args: Any) -> None:
        resolved_before = getattr(server_args, "_resolution_finished", False)  # a copy in a child process
        try:
            original(server_args)
        except Exception:  # SGLang asserts some of what is refused here, without a word
            refuse_or_warn(server_args, level)
            raise
        if not resolved_before:
            refuse_or_warn(server_args, level)

    return Hook(HookTarget("server_args.ServerArgs.resolve_once"), "AROUND", resolve_and_check)


def refuse_or_warn(server_args: Any, level: Level) -> None:
    """
    Raises:
        SystemExit: the launch is refused; its text is the one line that says why and what to do.
    """
    from sglang.srt.arg_groups.overrides import resolving_view

    flags = LaunchFlags.from_server_args(resolving_view(server_args))
    if not flags.enable_eplb:
        return
    findings = check_launch(Launch(flags, level, os.environ.get("SGLANG_PLUGINS", ""), count_experts(flags.model_path)))
    refused = [f"{finding.flag} {finding.message}" for finding in findings if finding.severity == "refused"]
    if refused:
        raise SystemExit(f"equipoise: level {level} cannot run: {'; '.join(refused)}")
    for finding in findings:
        if finding.severity == "trap":
            log.warning("%s %s", finding.flag, finding.message)
