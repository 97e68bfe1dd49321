"""Kernels and helpers are compiled for one set of types each: a second one would double what a cold start waits for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

_MIXED_CALLS = """
import gc, json, logging
import numpy as np
from numba.core.dispatcher import Dispatcher
from equipoise import EpTopology, ExpertLocationMetadata, plan_transfer, rebalance_experts
from equipoise.algorithms.registry import available_algorithms, find_algorithm
from equipoise.manager.warm_up import compile_kernels

logging.disable()
compile_kernels()
topology = EpTopology.for_experts(16, 8, 4, 2)
current = ExpertLocationMetadata.trivial(3, 16, topology)
counts = np.random.default_rng(0).integers(0, 50, (3, 3, 16), dtype=np.int32)
loads = counts, counts[0] / 7.0, counts[:, ::-1, ::-1], np.asfortranarray(counts[0])
for algorithm in available_algorithms():
    for dispatch in find_algorithm(algorithm).dispatch:
        for load in loads:
            for placement in (None, current):
                planned = rebalance_experts(
                    load, topology, algorithm=algorithm, dispatch=dispatch, current=placement, num_groups=4,
                    max_moves_per_layer=None if placement is None else np.int64(6), tokens_per_step=64,
                )
                plan_transfer(current, planned, topology, max_staged_experts=6)
found = {}
for each in gc.get_objects():
    if isinstance(each, Dispatcher) and each.py_func.__module__.startswith("equipoise."):
        name = f"{each.py_func.__module__}.{each.py_func.__qualname__}"
        found.setdefault(name, []).extend([str(types) for types in each.overloads])
print(json.dumps(found))
"""
_MAKERS = "equipoise.jit.compile."  # a few lines each, one version for each literal; `zeros` is one function a dtype
_SEVERAL = {"equipoise.transfer.planning.sources.chunk_of": 2}  # one line, of a literal chunk as well


def test_no_kernel_is_compiled_for_a_second_set_of_types(tmp_path: Path) -> None:
    """From an empty cache: what is loaded with a kernel does not tell what helpers it was compiled from."""
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", _MIXED_CALLS], capture_output=True, text=True, timeout=280, env=env
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {name.rsplit(".", 1)[1] for name in found} > {"_improve_layers", "_pack_layers", "judge", "add_share"}
    too_many = {
        name: types
        for name, types in found.items()
        if len(types) > _SEVERAL.get(name, 1) and not name.startswith(_MAKERS)
    }
    assert not too_many, json.dumps(too_many, indent=2)
