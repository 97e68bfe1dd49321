"""``equipoise doctor sglang``: what a launch of SGLang would run into, without SGLang and without a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version

from equipoise.hosts.sglang.launch.check import PLUGIN_NAME, check_launch
from equipoise.hosts.sglang.launch.findings import Finding, Launch
from equipoise.hosts.sglang.launch.flags import LaunchFlags
from equipoise.hosts.sglang.launch.placement_check import count_experts
from equipoise.hosts.sglang.launch.settings import PluginSettings, read_settings
from equipoise.hosts.sglang.launch.versions import SUPPORTED, version_complaint

PLUGIN_GROUP = "sglang.srt.plugins"


@dataclass(frozen=True)
class Examination:
    """
    Attributes:
        sglang_version: installed in this environment; None if it is not.
        findings: the refusals first.
        ignored: arguments that balancing does not look at.
    """

    settings: PluginSettings
    flags: LaunchFlags
    sglang_version: str | None
    findings: list[Finding]
    ignored: list[str]


def examine(arguments: Sequence[str], environment: Mapping[str, str]) -> Examination:
    """Checks the launch ``sglang serve ARGUMENTS`` in this environment.

    Raises:
        ConfigError: settings or a flag's value that cannot be read.
    """
    settings = read_settings(environment)
    flags, ignored = LaunchFlags.from_command_line(arguments)
    launch = Launch(
        flags,
        settings.level,
        plugins=environment.get("SGLANG_PLUGINS", ""),
        num_logical_experts=count_experts(flags.model_path),
    )
    installed = _installed_version()
    findings = [*_installation(installed), *check_launch(launch)]
    if flags.model_path is not None and launch.num_logical_experts is None:
        text = f"{flags.model_path} is no local directory with a config.json: slots per rank were not checked"
        findings.append(Finding("note", "--model-path", text))
    return Examination(settings, flags, installed, findings, ignored)


def _installed_version() -> str | None:
    try:
        return version("sglang")
    except PackageNotFoundError:
        return None


def _installation(installed: str | None) -> list[Finding]:
    if installed is None:
        text = f"is not installed in this environment; the plugin needs {SUPPORTED}"
        return [Finding("note", "sglang", text)]
    found = []
    if complaint := version_complaint(installed):
        found.append(Finding("refused", "sglang", complaint))
    if not any(point.name == PLUGIN_NAME for point in entry_points(group=PLUGIN_GROUP)):
        text = "is not registered as a plugin in this environment: pip install 'equipoise[sglang]' next to SGLang"
        found.append(Finding("trap", "equipoise", text))
    return found
