"""Compiles the dispatch kernels for a GPU that need not be there; run as a program, prints one JSON line a kernel.

ptxas and cuobjdump come with the triton wheel. Argument: the compute capability, 90 for an H100.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from equipoise.dispatch import turns_gpu
from equipoise.dispatch.solver.kernels import assign, count_and_solve, solve_gathered
from equipoise.dispatch.turns_kernel import choose

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# 256 experts: 288 slots on 32 ranks with 8 choices, 432 on 144 with 16.
TILES = {
    "288/32": ({"E": 256, "EP": 512, "M": 32, "C": 8, "D": 16, "G": 32}, 1),
    "432/144": ({"E": 256, "EP": 512, "M": 256, "C": 16, "D": 4, "G": 256}, 8),
}
# Experts, and replicas that one may have: 288 slots, and the most that is promised.
TURNS_TILES = {"288/32": {"E": 256, "X": 33, "K": 8}, "2048/512": {"E": 1024, "X": 1025, "K": 16}}
SCALARS = {"num_ids", "top_k", "num_ranks", "own_row", "none", "first_own", "last_own"}
SCALARS |= {"first_token", "layer", "own_rank"}
POINTERS = {"next_token": "*i64", "table": "*i64", "cdf": "*fp32"}  # the others, but for ids and slots, are int32


def compiled(kernel: triton.JITFunction, constants: dict[str, object], id_type: str, warps: int, capability: int):
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    types = dict.fromkeys(SCALARS, "i32") | POINTERS | dict.fromkeys(("ids", "slots"), f"*{id_type}")
    signature = {name: "constexpr" if name in constants else types.get(name, "*i32") for name in names}
    source = ASTSource(
        fn=kernel, signature=signature, constexprs={(names.index(name),): value for name, value in constants.items()}
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def figures(cubin: bytes) -> dict[str, int]:
    """Registers, spilled bytes, instructions, barriers and late reads of a kernel's machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
        code = subprocess.run([CUOBJDUMP, "-sass", file.name], check=True, capture_output=True, text=True).stdout
    spilled = re.search(r"LOCAL:(\d+)", usage)
    registers = re.search(r"REG:(\d+)", usage)
    stack = re.search(r"STACK:(\d+)", usage)
    assert spilled is not None and registers is not None and stack is not None, usage  # noqa: PT018
    return {
        "registers": int(registers[1]),
        "local_bytes": int(spilled[1]) + int(stack[1]),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE)),
        "barriers": len(re.findall(r"\bBAR\.", code)),
        "reads_after_a_comparison": len(re.findall(r"\bLDG\.", code.partition("FSETP")[2])),  # of floats
    }


def main() -> None:
    capability = int(sys.argv[1])
    for tile, (sizes, warps) in TILES.items():
        for name, kernel, constants, num_warps in (
            ("count", count_and_solve, {"BLOCK": 256, "SOLVE": False}, warps),
            ("count_and_solve", count_and_solve, {"BLOCK": 256, "SOLVE": True}, warps),
            ("solve_gathered", solve_gathered, {}, warps),
            ("assign", assign, {"BLOCK": 256, "ROWS": 16, "GATHERED": True, "RECORD": True}, 4),
        ):
            for id_type in ("i32", "i64") if "ids" in kernel.arg_names else ("i32",):
                binary = compiled(kernel, sizes | constants, id_type, num_warps, capability)
                row = {"kernel": name, "tile": tile, "ids": id_type} | figures(binary.asm["cubin"])
                print(json.dumps(row), flush=True)
    for row in turns_figures(capability):
        print(json.dumps(row), flush=True)


def turns_figures(capability: int) -> Iterator[dict[str, object]]:
    """The kernel of ``static`` and ``dynamic``, which counts and sees padding."""
    options = {"BLOCK": turns_gpu.BLOCK, "PADDED": True, "RECORD": True}
    for tile, sizes in TURNS_TILES.items():
        for name, turns in (("static", False), ("dynamic", True)):
            for id_type in ("i32", "i64"):
                binary = compiled(choose, sizes | options | {"TURNS": turns}, id_type, 1, capability)
                yield {"kernel": name, "tile": tile, "ids": id_type} | figures(binary.asm["cubin"])


if __name__ == "__main__":
    main()
