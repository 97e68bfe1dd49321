"""Runs the tests that need a GPU, each in a process of its own with a time limit, and writes one report.

Without a GPU it runs the part that needs none, says so, and ends with that part's exit code. The report, with figures
and the card's name, goes to benchmark/results/gpu-CARD.md.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Most information a minute first. What needs several GPUs comes last, since it takes longest.
FILES = (
    "test/gpu/test_one_gpu.py",
    "test/gpu/test_transfers_on_gpu.py",
    "test/gpu/test_engine_on_gpu.py",
    "test/gpu/test_several_gpus.py",
)
PYTEST = (sys.executable, "-m", "pytest", "-o", "addopts=--strict-markers -q")  # a second -q would list no test
GRACE_SECONDS = 30.0  # beyond a test's own limit, for a process that hangs in a driver call


@dataclass
class Outcome:
    """How one test ended."""

    test: str
    result: str  # passed, failed, skipped, hung
    seconds: float
    words: str = ""
    figures: dict[str, str] = field(default_factory=dict)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmark" / "results", help="where the report goes")
    parser.add_argument("--quick", action="store_true", help="only the part that needs no GPU")
    arguments = parser.parse_args()
    without = subprocess.run([*PYTEST, "-m", "not gpu", "test/gpu"], cwd=ROOT).returncode
    card = card_name()
    if card is None or arguments.quick:
        print("No GPU: ran the part that needs none, and nothing of what only a GPU can settle.")
        return without
    outcomes = [run(test, seconds) for test, seconds in collect()]
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"gpu-{re.sub(r'[^a-z0-9]+', '-', card.lower()).strip('-')}.md"
    path.write_text(report(card, outcomes))
    print(f"written: {path}")
    return without or int(any(outcome.result in ("failed", "hung") for outcome in outcomes))


def card_name() -> str | None:
    """The first GPU's name, asked for in another process so that this one never starts CUDA."""
    code = "import torch; print(torch.cuda.get_device_name(0) if torch.cuda.device_count() else '')"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return said.strip() or None


def collect() -> list[tuple[str, float]]:
    """(test id, seconds) in the order of the files."""
    said = subprocess.run(
        [*PYTEST, "--collect-only", "-m", "gpu", *FILES],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    limits: dict[str, float] = {}
    for file in FILES:
        pattern = r"@pytest\.mark\.timeout\((\d+)\)(?:\n@[^\n]*)*\ndef (test_\w+)"
        for seconds, name in re.findall(pattern, (ROOT / file).read_text()):
            limits[name] = float(seconds)
    tests = [line for line in said.splitlines() if "::" in line]
    assert tests, said
    return [(test, limits[re.sub(r"\[.*", "", test.split("::")[1])]) for test in tests]


def run(test: str, seconds: float) -> Outcome:
    """Runs one test in a process of its own."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        xml = Path(directory) / "report.xml"
        try:
            subprocess.run(
                [*PYTEST, f"--junitxml={xml}", test], cwd=ROOT, timeout=seconds + GRACE_SECONDS
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Outcome(test, "hung", time.monotonic() - start, f"no end after {seconds:g} s")
        if not xml.is_file():
            return Outcome(test, "failed", time.monotonic() - start, "the process died")
        case = next(ElementTree.parse(xml).getroot().iter("testcase"))
    figures = {each.get("name", ""): each.get("value", "") for each in case.iter("property")}
    problem = next((each for each in case if each.tag in ("failure", "error", "skipped")), None)
    result = "passed" if problem is None else "skipped" if problem.tag == "skipped" else "failed"
    words = "" if problem is None else (problem.get("message") or "").splitlines()[0]
    return Outcome(test, result, time.monotonic() - start, words, figures)


def report(card: str, outcomes: list[Outcome]) -> str:
    """Markdown: a line a test, then the figures."""
    lines = [f"# {card}", "", "Made by `make test-gpu`.", "", "| test | result | seconds | |", "|---|---|---|---|"]
    for outcome in outcomes:
        name = outcome.test.split("::")[1]
        lines.append(f"| {name} | {outcome.result} | {outcome.seconds:.1f} | {outcome.words.replace('|', '/')} |")
    lines += ["", "| test | figure | value |", "|---|---|---|"]
    for outcome in outcomes:
        for name, value in outcome.figures.items():
            lines.append(f"| {outcome.test.split('::')[1]} | {name} | {value} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
