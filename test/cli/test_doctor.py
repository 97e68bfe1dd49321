"""`equipoise doctor sglang` as a person runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from equipoise.cli.main import main

SOUND = ["--tp=4", "--ep=4", "--enable-eplb", "--ep-num-redundant-experts=4", "--ep-dispatch-algorithm=dynamic"]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EQUIPOISE_SGLANG", "EQUIPOISE_CONFIG", "SGLANG_PLUGINS"):
        monkeypatch.delenv(name, raising=False)


def test_sound_launch_exits_0_and_says_what_was_not_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "sglang", *SOUND, "--context-length", "4096"]) == 0
    assert "not looked at: --context-length 4096" in capsys.readouterr().out


def test_findings_exit_1_and_name_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_experts": 6}))
    assert main(["doctor", "sglang", *SOUND, f"--model-path={tmp_path}"]) == 1
    assert "--ep-num-redundant-experts" in capsys.readouterr().out


def test_settings_are_the_environments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    assert main(["doctor", "sglang", *SOUND]) == 1
    assert "SGLANG_PLUGINS" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["vllm2"], ["sglang", "--tp", "x"]])
def test_bad_input_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *arguments]) == 2
    assert capsys.readouterr().err.startswith("equipoise: error: ")
