"""Damages one file of every format at random and expects a trace, or a refusal in one line; nothing else.

    python scripts/fuzz_formats.py [--examples 10000] [--seed 0] [--only NAME]

A found fault prints the format, the seed of the example and the exception, and ends with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from equipoise.errors import InvalidInputError
from equipoise.formats.readers.placements import read_init_expert_location
from equipoise.formats.readers.tensorrt_llm import write_assignments
from equipoise.formats.readers.vllm_ascend import write_expert_map
from equipoise.load.export import export_trace
from equipoise.load.trace import LoadTrace

COUNTS = np.random.default_rng(0).integers(0, 99, (6, 2, 8))
P2L = np.arange(12).reshape(1, 12).repeat(2, 0) % 8


def _per_pass(path: Path) -> None:
    ids = torch.randint(0, 12, (2, 5, 3), dtype=torch.int32)
    records = [
        {"forward_pass_id": i, "rank": 0, "gatherer_key": "primary", "forward_mode": 1, "topk_ids_of_layer": ids,
         "global_physical_count": torch.ones(2, 12, dtype=torch.int32)} for i in range(3)
    ]  # fmt: skip
    torch.save({"records": records, "last_physical_to_logical_map": torch.tensor(P2L)}, path)


def _tokens(path: Path) -> None:
    np.savez(path, topk=np.random.default_rng(0).integers(0, 8, (40, 2, 3)), seq_lens=np.array([20, 20]))


def _trtllm(path: Path) -> None:
    save_file({f"{t}_{layer}": COUNTS[t, layer] for t in range(6) for layer in (0, 1)}, path)


def _load_view(path: Path) -> None:
    torch.save({"moe_load": torch.ones(2, 3, 4), "expert_maps": torch.tensor(P2L.reshape(2, 3, 4))}, path)


def _jsonl(path: Path) -> None:
    lines = [{"iteration": t, "layer": c, "tokens_per_expert": COUNTS[t, c].tolist()} for t in range(6) for c in (0, 1)]
    path.write_text("\n".join(map(json.dumps, lines)))


def _expert_map(path: Path) -> None:
    path.write_text(json.dumps(write_expert_map(P2L, 3, [0, 1])))


def _assignments(path: Path) -> None:
    path.write_text(write_assignments(P2L, [3, 4]))


def _exported(path: Path) -> None:
    export_trace(LoadTrace(COUNTS), path)


MAKERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "trace": ("t.safetensors", _exported),
    "dump": ("t.npz", _exported),
    "stat": ("t.pt", _exported),
    "per_token": ("t.pt", _per_pass),
    "tokens": ("t.npz", _tokens),
    "trtllm": ("rank0.safetensors", _trtllm),
    "load view": ("t.pt", _load_view),
    "csv": ("t.csv", _exported),
    "json": ("t.json", _exported),
    "jsonl": ("t.jsonl", _jsonl),
    "npy": ("t.npy", lambda path: np.save(path, COUNTS)),
    "expert map": ("t.json", _expert_map),
    "assignments": ("t.yaml", _assignments),
}
_TOKENS = (
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"{}",
    b"[]",
    b"99999999999999999999",
    b'"x"',
    b"\x00",
    b"\xff\xff\xff\xff",
    b"&a",
    b"*a",
)


def damage(data: bytes, rng: random.Random) -> bytes:
    """Cuts, flips, repeats, and puts in what parsers stumble over."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out)) if out else 0
        match rng.randrange(6):
            case 0:
                del out[at:]
            case 1 if out:
                out[at] ^= 1 << rng.randrange(8)
            case 2 if out:
                out[at] = rng.randrange(256)
            case 3:
                del out[at : at + rng.randint(1, 16)]
            case 4:
                out[at : at + rng.randint(0, 3)] = rng.choice(_TOKENS)
            case 5:
                out[at:at] = out[at : at + rng.randint(1, 64)]
    return bytes(out)


def attempt(path: Path) -> str:
    """How a damaged file was taken. Raises what is neither an answer nor one of our errors of one line."""
    outcome = "read"
    for read in (LoadTrace.open, lambda p: read_init_expert_location(str(p))):
        try:
            read(path)
        except InvalidInputError as error:
            if "\n" in str(error) or path.name not in str(error):
                raise AssertionError(f"not one line that names the file: {error!r}") from error
            outcome = "refused"
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=MAKERS)
    arguments = parser.parse_args()
    logging.disable()  # notes on what is read
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, (file_name, make) in MAKERS.items():
            if arguments.only not in (None, name):
                continue
            path = Path(folder) / file_name
            make(path)
            good, outcomes, began = path.read_bytes(), Counter[str](), time.monotonic()
            for example in range(arguments.examples):
                path.write_bytes(damage(good, random.Random(f"{arguments.seed}-{name}-{example}")))
                try:
                    outcomes[attempt(path)] += 1
                except BaseException as error:
                    failed += 1
                    print(f"{name}, example {example}: {type(error).__name__}: {error}")
                    if failed > 20:
                        return 1
            print(f"{name:12s} {dict(outcomes)} in {time.monotonic() - began:.0f} s", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
