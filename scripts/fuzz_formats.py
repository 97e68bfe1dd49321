"""Damages one file of every format (hypothesis) and expects a trace, or a refusal in one line; nothing else.

    python scripts/fuzz_formats.py [--examples 10000] [--seed 0] [--only NAME]

A found fault prints the format and the smallest damage that shows it, and ends with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
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


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """``data`` cut, flipped, repeated, or with something in it that parsers stumble over; one to four times."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(out) - 1, 0)))
        match draw(st.integers(0, 5)):
            case 0:
                del out[at:]
            case 1 if out:
                out[at] ^= 1 << draw(st.integers(0, 7))
            case 2 if out:
                out[at] = draw(st.integers(0, 255))
            case 3:
                del out[at : at + draw(st.integers(1, 16))]
            case 4:
                out[at : at + draw(st.integers(0, 3))] = draw(st.sampled_from(_TOKENS))
            case 5:
                out[at:at] = out[at : at + draw(st.integers(1, 64))]
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


def fuzz(path: Path, good: bytes, examples: int, seed_of_run: int) -> Counter[str]:
    """Counts how the damaged files were taken. Raises what :func:`attempt` raised for the smallest damage."""
    outcomes = Counter[str]()

    @seed(seed_of_run)
    @settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    @given(damaged(good))
    def read(data: bytes) -> None:
        path.write_bytes(data)
        outcomes[attempt(path)] += 1

    read()
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=MAKERS)
    arguments = parser.parse_args()
    logging.disable()  # notes on what is read
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in MAKERS if arguments.only is None else [arguments.only]:
            file_name, make = MAKERS[name]
            path, began = Path(folder) / file_name, time.monotonic()
            make(path)
            try:
                outcomes = fuzz(path, path.read_bytes(), arguments.examples, arguments.seed)
            except Exception:
                failed += 1
                print(f"{name}:\n{traceback.format_exc()}", flush=True)
                continue
            print(f"{name:12s} {dict(outcomes)} in {time.monotonic() - began:.0f} s", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
