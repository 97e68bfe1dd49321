"""Checks what `make dist` built: versions agree, nothing is missing, and the wheel works where it is installed.

The wheel is installed into a new environment on top of this one's packages, away from the checkout, and replays the
sample trace there.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IN_SDIST = (
    "CHANGELOG.md",
    "Makefile",
    "constraints.txt",
    "docs/loop.md",
    "test/conftest.py",
    "examples/host_the_core.py",
)
IN_WHEEL = ("equipoise/py.typed", "equipoise/engine/demo_model/model.safetensors", "equipoise/cli/main.py")


def source_version() -> str:
    for node in ast.parse((ROOT / "python" / "equipoise" / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise SystemExit("equipoise/__init__.py has no __version__")


def check_names(dist: Path, tag: str | None) -> Path:
    """Versions of the tag, the source, the changelog and both files agree, and both hold what they must; the wheel."""
    version = source_version()
    if tag is not None:
        if tag != f"v{version}":
            raise SystemExit(f"the tag is {tag}, the version {version}")
        if not re.search(rf"^## {re.escape(version)}$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE):
            raise SystemExit(f"CHANGELOG.md has no section {version}")
    sdist, wheel = dist / f"equipoise-{version}.tar.gz", dist / f"equipoise-{version}-py3-none-any.whl"
    for path in (sdist, wheel):
        if not path.is_file():
            raise SystemExit(f"{path} is not there: run make dist")
    with tarfile.open(sdist) as archive:
        lacking = {f"equipoise-{version}/{name}" for name in IN_SDIST} - set(archive.getnames())
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    lacking |= set(IN_WHEEL) - names
    if lacking:
        raise SystemExit(f"not in the distribution: {', '.join(sorted(lacking))}")
    stray = {name for name in names if not name.startswith(("equipoise/", f"equipoise-{version}.dist-info/"))}
    stray |= {name for name in names if name.endswith((".nbi", ".nbc", ".pyc"))}
    if stray:
        raise SystemExit(f"the wheel has files that nobody wants: {', '.join(sorted(stray))}")
    return wheel


def check_install(wheel: Path) -> None:
    """Installs the wheel into an environment of its own and uses it as a person would."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "venv", with_pip=False)
        scripts, site = (
            Path(sysconfig.get_path(kind, "venv", vars={"base": str(folder / "venv")}))
            for kind in ("scripts", "purelib")
        )
        install = [sys.executable, "-m", "pip", "--python", str(scripts / "python"), "install", "--quiet", "--no-deps"]
        run([*install, str(wheel)], folder)
        # Dependencies come from here; of the checkout itself, which may be installed here as well, nothing does.
        others = [path for path in sys.path if path.endswith("site-packages")]
        (site / "dependencies.pth").write_text("\n".join(others) + "\n")
        where = run([str(scripts / "python"), "-c", "import equipoise; print(equipoise.__file__)"], folder)
        if not Path(where.strip()).is_relative_to(folder.resolve()):
            raise SystemExit(f"the installed package is not the one that is imported: {where}")
        program = str(scripts / "equipoise")
        said = run([program, "--version"], folder).strip()
        if said != f"equipoise {source_version()}":
            raise SystemExit(f"equipoise --version says {said!r}")
        run([program, "--help"], folder)
        trace = site / "equipoise" / "engine" / "demo_model" / "sample_trace.npz"
        print(run([program, "replay", str(trace), "--num-redundant-experts", "8", "--window", "32"], folder))


def run(command: list[str], folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="folder with the sdist and the wheel")
    parser.add_argument("--tag", help="the tag that is released: must be v and the version")
    arguments = parser.parse_args()
    wheel = check_names(arguments.dist, arguments.tag)
    check_install(wheel.resolve())
    print(f"{wheel.name} and its sdist can be released")


if __name__ == "__main__":
    main()
