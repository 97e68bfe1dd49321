"""Damaged files of every format: a trace or a refusal in one line. ``scripts/fuzz_formats.py`` runs 10,000 a format."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz_formats.py"


def test_damaged_files_of_every_format_are_read_or_refused() -> None:
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--examples", "40"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("refused") == 13
