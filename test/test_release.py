"""What describes the project agrees with it: the version, the API page, the classifiers, CI and pre-commit."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import equipoise
from helpers.documents import FOLDERS

ROOT = Path(__file__).resolve().parents[1]
KNOWN_AT_THE_TOP = {
    ".gitignore",
    ".pre-commit-config.yaml",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "constraints.txt",
    "pyproject.toml",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_version_is_written_once() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "equipoise.__version__"}
    assert script("check_release").source_version() == equipoise.__version__


def test_the_changelog_has_a_section_for_the_version() -> None:
    sections = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[0] == "Unreleased"
    assert equipoise.__version__ in sections


def test_a_tag_that_is_not_the_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"the tag is v9\.9\.9, the version"):
        script("check_release").check_names(tmp_path, "v9.9.9")


def test_api_page_is_current() -> None:
    assert (ROOT / "docs" / "api.md").read_text() == script("make_api_page").page(), (
        "run `make api` and commit docs/api.md"
    )


def test_every_exported_name_is_on_the_api_page() -> None:
    headings = re.findall(r"^### `(\w+)`$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert headings == sorted(equipoise.__all__)


def test_ci_runs_every_python_that_the_package_claims() -> None:
    claimed = [
        each.rpartition(" ")[2] for each in PROJECT["project"]["classifiers"] if re.search(r"Python :: 3\.\d+$", each)
    ]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python-version"] == claimed
    assert PROJECT["project"]["requires-python"] == f">={claimed[0]}"
    assert ".ci/run" in [step.get("run") for step in workflow["jobs"]["test"]["steps"]]


def test_pre_commit_runs_what_make_check_runs() -> None:
    makefile = (ROOT / "Makefile").read_text()
    checks = re.findall(r"^\t\$\(BIN\)/(\w+)(?: (\w+))?", makefile.split("\ncheck:")[1].split("\n\n")[0], re.MULTILINE)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    entries = [hook["entry"] for hook in hooks]
    for tool, subcommand in checks:
        assert any(entry.startswith(f".venv/bin/{tool} {subcommand}".strip()) for entry in entries), tool


def test_every_dependency_has_a_pinned_version() -> None:
    pinned = {
        name.lower() for name in re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    }
    project = PROJECT["project"]
    needed = (
        project["dependencies"] + project["optional-dependencies"]["dev"] + project["optional-dependencies"]["plot"]
    )
    names = {re.match(r"[\w-]+", each)[0].replace("-", "_").lower() for each in needed}  # type: ignore[index]
    assert names - {"equipoise"} <= {name.replace("-", "_") for name in pinned}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_nothing_lies_about_at_the_top() -> None:
    """A script or a log that was committed by mistake shows here."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = done.stdout.splitlines()
    assert {name for name in listed if "/" not in name and not name.endswith(".md")} == KNOWN_AT_THE_TOP
    assert {name.partition("/")[0] for name in listed if "/" in name} == set(FOLDERS)
