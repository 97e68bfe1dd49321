"""Mutates one file of every format where that reaches new code of its reader, and expects what fuzz_formats.py expects.

    pip install atheris
    python scripts/fuzz_coverage.py [--runs 10000] [--only NAME]

Ends with exit code 1 at the first fault, having printed the exception; libFuzzer keeps the input in ``out/fuzz/``.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    import atheris
except ImportError:
    sys.exit("atheris is needed: pip install atheris (Python 3.11 to 3.13 on Linux)")

with atheris.instrument_imports(include=["equipoise.formats", "equipoise.load"]):
    from fuzz_formats import MAKERS, attempt

ARTIFACTS = Path("out/fuzz")


def fuzz_one(name: str, runs: int) -> None:
    """Fuzzes one format in this process, which ends with it."""
    logging.disable()
    file_name, make = MAKERS[name]
    folder = Path(tempfile.mkdtemp())
    corpus = folder / "corpus"
    corpus.mkdir()
    path = folder / file_name
    make(path)
    (corpus / "good").write_bytes(path.read_bytes())

    def read(data: bytes) -> None:
        path.write_bytes(data)
        attempt(path)

    options = [
        f"-runs={runs}",
        "-max_len=65536",
        f"-artifact_prefix={ARTIFACTS}/",
        "-verbosity=0",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], str(corpus), *options], read)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000, help="inputs a format")
    parser.add_argument("--only", choices=MAKERS)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    if arguments.here:
        fuzz_one(arguments.only, arguments.runs)
    for name in MAKERS if arguments.only is None else [arguments.only]:
        # One process a format: libFuzzer ends the process that it ran in.
        command = [sys.executable, __file__, "--here", "--only", name, "--runs", str(arguments.runs)]
        done = subprocess.run(command, capture_output=True, text=True)
        said = [line for line in done.stderr.splitlines() if "number_of_executed_units" in line]
        print(f"{name:12s} {said[0].split()[-1] if said else '?'} inputs, exit status {done.returncode}", flush=True)
        if done.returncode:
            print(done.stdout[-2000:], done.stderr[-4000:], sep="\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
