"""Entry point of the SGLang plugin: reads the settings, checks SGLang's version and hook points, registers the hooks.

SGLang calls :func:`register` in every process it starts. Each hook is registered where its module is needed anyway: in
schedulers and in the process that serves HTTP, not in the detokenizer.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import version

from equipoise.errors import ConfigError
from equipoise.hosts.sglang.algorithm import algorithm_hooks
from equipoise.hosts.sglang.command_channel import register_messages
from equipoise.hosts.sglang.hook_targets import Hook, register_hooks
from equipoise.hosts.sglang.http_side import http_hook
from equipoise.hosts.sglang.launch.settings import PluginSettings, read_settings
from equipoise.hosts.sglang.launch.versions import version_complaint
from equipoise.hosts.sglang.launch_guard import launch_guard_hook
from equipoise.hosts.sglang.scheduler_side import SchedulerSide

log = logging.getLogger("equipoise.hosts.sglang")


def register() -> None:
    """Hooks Equipoise into SGLang, as ``EQUIPOISE_SGLANG`` or the file of ``EQUIPOISE_CONFIG`` says.

    Raises:
        SystemExit: settings that cannot be read, or a version of SGLang that is not supported, in one line. Only an
            exception that is no ``Exception`` stops a launch: SGLang logs the others and goes on without the plugin.
    """
    try:
        settings = read_settings(os.environ)
    except ConfigError as error:
        raise SystemExit(f"equipoise: {error}") from error
    if settings.level == "off" or _is_detokenizer():
        return
    if complaint := version_complaint(version("sglang")):
        if settings.given or "--enable-eplb" in sys.argv:
            raise SystemExit(f"equipoise: {complaint}")
        log.warning("%s; nothing is hooked", complaint)
        return
    try:
        register_hooks(_hooks(settings))
    except RuntimeError as error:
        raise SystemExit(f"equipoise: this SGLang is not the one it was built for: {error}") from error


def _hooks(settings: PluginSettings) -> list[Hook]:
    hooks = [launch_guard_hook(settings.level)]
    if settings.level == "algorithm":
        return hooks + algorithm_hooks() if _is_scheduler() else hooks
    register_messages()
    hooks.append(http_hook())
    return hooks + SchedulerSide(settings).hooks() if _is_scheduler() else hooks


def _is_scheduler() -> bool:
    """Whether this process runs a scheduler, or has loaded all that one needs."""
    return "sglang.srt.managers.scheduler" in sys.modules


def _is_detokenizer() -> bool:
    return "sglang.srt.managers.detokenizer_manager" in sys.modules and not _is_scheduler()
