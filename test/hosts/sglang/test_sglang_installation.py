"""What the plugin takes for granted about the SGLang that is installed, asked of it without a server."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict

import pytest

from equipoise.hosts.sglang.launch.flags import LaunchFlags
from helpers.sglang_server import PYTHON, ROOT, SHIMS

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]


def run_there(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in the environment of SGLang."""
    variables = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'python'}:{SHIMS}",
        "SGLANG_USE_CPU_ENGINE": "1",
        **environment,
    }
    return subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, env=variables, check=False)


def test_flags_have_sglangs_names_and_defaults() -> None:
    code = """
import json, msgspec
from sglang.srt.server_args import ServerArgs
defaults = {field.name: field.default for field in msgspec.structs.fields(ServerArgs)}
print(json.dumps({name: value for name, value in defaults.items() if isinstance(value, (int, float, str, type(None)))}))
"""
    ran = run_there(code)
    assert ran.returncode == 0, ran.stderr[-2000:]
    theirs = json.loads(ran.stdout.splitlines()[-1])
    ours = asdict(LaunchFlags())
    ours.pop("model_path")  # required there
    assert {name: theirs.get(name, "missing") for name in ours} == ours


@pytest.mark.parametrize("level", ["algorithm", "manager", "full"])
def test_every_hook_target_is_there_with_its_signature(level: str) -> None:
    """And is patched: SGLang only logs a hook that it cannot apply."""
    code = """
import sglang.srt.managers.scheduler
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
load_plugins()
missing = sorted(set(HookRegistry._hooks) - HookRegistry._patched)
print(len(HookRegistry._patched), missing)
"""
    ran = run_there(code, EQUIPOISE_SGLANG=level, SGLANG_PLUGINS="equipoise")
    assert ran.returncode == 0, ran.stderr[-2000:]
    count, missing = ran.stdout.splitlines()[-1].split(" ", 1)
    assert missing == "[]"
    assert int(count) == {"algorithm": 5, "manager": 16, "full": 16}[level]


def test_level_off_and_another_plugins_list_leave_sglang_alone() -> None:
    code = """
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
load_plugins()
print(sorted(HookRegistry._hooks))
"""
    for environment in ({"EQUIPOISE_SGLANG": "off"}, {"SGLANG_PLUGINS": "another"}):
        ran = run_there(code, **{"SGLANG_PLUGINS": "equipoise", **environment})
        assert ran.stdout.splitlines()[-1] == "[]", ran.stderr[-2000:]
