"""``equipoise doctor sglang FLAGS``: a table of what a launch would run into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from equipoise.errors import ConfigError
from equipoise.hosts.sglang.launch.doctor import Examination, examine

HOSTS = ("sglang",)
_STYLES = {"refused": "bold red", "trap": "yellow", "note": "dim"}


def run_doctor(arguments: Sequence[str], environment: Mapping[str, str], console: Console) -> int:
    """Examines a launch and shows the findings; 1 if something would be refused or not work as meant, else 0.

    Args:
        arguments: the host's name, then the flags of the launch.

    Raises:
        ConfigError: an unknown host, settings or a flag's value that cannot be read.
    """
    host = arguments[0] if arguments else None
    if host not in HOSTS:
        known = ", ".join(HOSTS)
        raise ConfigError(f"doctor needs the name of an engine, one of {known}, got {host!r}", field="host")
    found = examine(arguments[1:], environment)
    _show(found, console)
    return int(any(finding.severity != "note" for finding in found.findings))


def _show(found: Examination, console: Console) -> None:
    sglang = found.sglang_version or "not installed here"
    console.print(f"SGLang {sglang}; level {found.settings.level}", highlight=False)
    if found.ignored:
        console.print(f"not looked at: {' '.join(found.ignored)}", style="dim", highlight=False, markup=False)
    if not found.findings:
        console.print("nothing found")
        return
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for finding in found.findings:
        table.add_row(finding.severity, f"{finding.flag}  {finding.message}", style=_STYLES[finding.severity])
    console.print(table)
