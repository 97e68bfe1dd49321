"""Peak memory of reading recordings: a stat dump of 1 GiB must take at most 2.2 GiB.

    python benchmark/formats_memory.py [--quick]

Each file is written by one process and read by another, whose peak resident size is printed beside the file's.
``--quick`` writes 64 MiB.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

LIMIT_GIB = 2.2
LAYERS, EXPERTS = 58, 256

WRITE = """
import sys, torch
path, steps, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
counts = torch.randint(1, 500, (steps, int(sys.argv[4]), int(sys.argv[5])), dtype=torch.int32)
if kind == "idle":
    counts[steps // 3 : steps // 3 + 5] = 0
if kind == "wrapped":
    counts[steps // 3 : steps // 3 + 5] = 0
    counts[0], counts[-1] = 1, 1
torch.save({"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": None}, path)
"""

READ = """
import resource, sys
import equipoise
from equipoise import LoadTrace
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
trace = LoadTrace.open(sys.argv[1])
total = int(trace.total().sum())
print(base, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, trace.num_steps, total)
"""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="64 MiB instead of 1 GiB")
    size = (64 << 20) if parser.parse_args().quick else (1 << 30)
    steps = size // (4 * LAYERS * EXPERTS)
    worst = 0.0
    print(f"{'file':28s} {'size':>10s} {'imports':>10s} {'peak':>10s} {'peak / size':>12s}")
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("in order", "idle", "wrapped"):
            path = Path(folder) / "dump.pt"
            subprocess.run([sys.executable, "-c", WRITE, path, *map(str, (steps, kind, LAYERS, EXPERTS))], check=True)
            done = subprocess.run([sys.executable, "-c", READ, path], check=True, capture_output=True, text=True)
            base, peak, *_ = (int(word) << 10 for word in done.stdout.split())
            actual = path.stat().st_size
            worst = max(worst, peak / 2**30)
            print(
                f"{'stat dump, ' + kind:28s} {actual / 2**30:6.2f} GiB {base / 2**30:6.2f} GiB {peak / 2**30:6.2f} GiB "
                f"{peak / actual:12.2f}"
            )
    print(f"limit {LIMIT_GIB} GiB: {'kept' if worst <= LIMIT_GIB else 'BROKEN'}")
    return int(worst > LIMIT_GIB)


if __name__ == "__main__":
    sys.exit(main())
