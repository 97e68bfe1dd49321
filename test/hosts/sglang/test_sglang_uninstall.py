"""docs/sglang.md followed word by word in an environment of SGLang's, and back again: SGLang is as it was."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from helpers.sglang_server import PYTHON, ROOT, SHIMS

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1800)]

HOOKS = """
import sglang.srt.managers.scheduler
from sglang.srt.eplb.eplb_algorithms import compute_algorithm
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
load_plugins()
try:
    known = compute_algorithm("equipoise", None, 1)
except KeyError:
    known = None
print(len(HookRegistry._patched), known)
"""


class Environment:
    """A virtual environment with all that ``.venv-sglang`` has, but for Equipoise."""

    def __init__(self, folder: Path, wheels: Path) -> None:
        subprocess.run([PYTHON, "-m", "venv", folder], check=True)
        self._folder = folder
        (self.packages,) = folder.glob("lib/python*/site-packages")
        (theirs,) = PYTHON.parents[1].glob("lib/python*/site-packages")
        for entry in theirs.iterdir():
            if "equipoise" not in entry.name and not (self.packages / entry.name).exists():
                (self.packages / entry.name).symlink_to(entry)
        self._variables = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "PIP_NO_INDEX": "1",  # what is not there already comes from the wheel of this checkout
            "PIP_FIND_LINKS": str(wheels),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_YES": "1",
        }

    def run(self, command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, env={**self._variables, **variables}, check=False
        )

    def hooks(self, level: str = "algorithm") -> str:
        """How many hooks are in force, and what SGLang knows ``--eplb-algorithm equipoise`` as."""
        variables = {
            "PYTHONPATH": str(SHIMS),
            "SGLANG_USE_CPU_ENGINE": "1",
            "SGLANG_PLUGINS": "equipoise",
            "EQUIPOISE_SGLANG": level,
        }
        ran = self.run(f"python -c '{HOOKS.replace(chr(39), chr(34))}'", **variables)
        assert ran.returncode == 0, ran.stderr[-2000:]
        return ran.stdout.splitlines()[-1]

    def entries(self) -> set[str]:
        return {entry.name for entry in self.packages.iterdir()}


def documented(beginning: str) -> str:
    """The command of docs/sglang.md that begins so, continuation lines included."""
    text = (ROOT / "docs/sglang.md").read_text()
    found = re.search(rf"{re.escape(beginning)}(?:[^`\n]*\\\n)*[^`\n]*", text)
    assert found is not None, f"docs/sglang.md has no command {beginning!r}"
    return found[0]


def test_install_doctor_and_uninstall_as_documented(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    build = [PYTHON, "-m", "pip", "wheel", "--quiet", "--no-deps", f"--wheel-dir={wheels}", ROOT]
    subprocess.run(build, check=True)
    environment = Environment(tmp_path / "environment", wheels)
    before, stock = environment.entries(), environment.hooks()
    assert stock == "0 None"

    installed = environment.run(documented("pip install --no-deps equipoise"))
    assert installed.returncode == 0, installed.stderr
    assert environment.entries() - before == {
        "equipoise",
        next(environment.packages.glob("equipoise-*.dist-info")).name,
    }
    hooks, algorithm = environment.hooks().split(" ", 1)
    assert (int(hooks) > 0, algorithm) == (True, "OwnAlgorithm(name='equipoise')")
    assert environment.hooks("off") == stock

    doctor = environment.run(documented("equipoise doctor sglang"))
    assert doctor.returncode == 1, doctor.stderr
    assert "--ep-dispatch-algorithm" in doctor.stdout
    assert "static" in doctor.stdout

    removed = environment.run(documented("pip uninstall equipoise"))
    assert removed.returncode == 0, removed.stderr
    assert environment.entries() == before
    assert environment.hooks() == stock
    sums = environment.run(
        "python - <<'END'\n"
        "import base64, hashlib\n"
        "from importlib.metadata import files\n"
        "inside = [file for file in files('sglang') if file.hash and '..' not in file.parts]\n"
        "changed = [str(file) for file in inside if file.hash.value != base64.urlsafe_b64encode("
        "hashlib.sha256(file.locate().read_bytes()).digest()).rstrip(b'=').decode()]\n"
        "print(changed)\nEND"
    )
    assert sums.stdout == "[]\n", sums.stdout + sums.stderr[-2000:]
