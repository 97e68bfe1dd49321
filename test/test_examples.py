"""Every script in examples/ runs as a user would run it, and says what it is there to say."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script: str, folder: Path, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_has_a_test() -> None:
    tested = {"rebalance_your_load.py", "host_the_core.py", "replay_and_plot.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_rebalance_your_load(tmp_path: Path) -> None:
    lines = run("rebalance_your_load.py", tmp_path).splitlines()
    balance = {line.split()[0]: float(line.split()[-3]) for line in lines if line.startswith(("deepseek", "auto"))}
    assert min(balance["deepseek"], balance["auto"]) > 0.95
    assert "transfers in" in lines[-4]


def test_host_the_core(tmp_path: Path) -> None:
    said = run("host_the_core.py", tmp_path)
    assert "committed:" in said
    assert "bytes moved" in said


def test_replay_and_plot(tmp_path: Path) -> None:
    said = run("replay_and_plot.py", tmp_path)
    balance = {line.split()[0]: float(line.split("balancedness ")[1].split(",")[0]) for line in said.splitlines()[:3]}
    assert balance["auto"] > balance["(nothing)"]
    assert (tmp_path / "replay.png").read_bytes().startswith(b"\x89PNG")
