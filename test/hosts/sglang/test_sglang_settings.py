"""The plugin's settings: the variable, the file, and what neither may hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from equipoise.errors import ConfigError
from equipoise.hosts.sglang.launch.settings import PluginSettings, read_settings


def test_full_unless_something_is_set() -> None:
    assert read_settings({}) == PluginSettings("full", given=False, options={})


def test_variable_wins_over_file(tmp_path: Path) -> None:
    file = tmp_path / "equipoise.toml"
    file.write_text('level = "manager"\n[eplb]\neplb_transfer_duty = 0.5\n')
    settings = read_settings({"EQUIPOISE_CONFIG": str(file)})
    assert (settings.level, settings.given, settings.options) == ("manager", True, {"eplb_transfer_duty": 0.5})
    assert read_settings({"EQUIPOISE_CONFIG": str(file), "EQUIPOISE_SGLANG": "algorithm"}).level == "algorithm"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('level = "best"', "best"),
        ("levle = 'full'", "levle"),
        ("[eplb]\neplb_algorithm = 'x'", "eplb_algorithm"),
        ("eplb = 3", "eplb"),
        ("[eplb]\neplb_load_phase = 'decode'", "unknown key 'eplb_load_phase'"),
        ("[eplb]\neplb_transfer_duty = 2.0", "eplb_transfer_duty must be in"),
        ("[eplb]\neplb_transfer_duty = 'x'", "wrong type"),
        ("[eplb]\nep_dispatch_algorithm = 'static'", "may be 'batch' here, got 'static'"),
        ("[eplb]\nep_dispatch_scope = 'node'", "ep_dispatch_scope"),
        ("level = 'algorithm'\n[eplb]\nep_dispatch_algorithm = 'batch'", "needs level manager or full"),
        ("[", "cannot be read"),
    ],
)
def test_what_the_file_may_not_hold_is_named(tmp_path: Path, content: str, named: str) -> None:
    file = tmp_path / "equipoise.toml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=named):
        read_settings({"EQUIPOISE_CONFIG": str(file)})


def test_missing_file_and_unknown_level_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_settings({"EQUIPOISE_CONFIG": str(tmp_path / "none.toml")})
    with pytest.raises(ConfigError, match="EQUIPOISE_SGLANG must be one of .*, got 'all'"):
        read_settings({"EQUIPOISE_SGLANG": "all"})
