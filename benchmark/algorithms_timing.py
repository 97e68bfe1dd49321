"""How long planners take: a usual plan on one thread, a large one on two, and compiling the kernels."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from algorithms_policies import Policy, ours
from algorithms_workloads import CONFIGURATIONS
from equipoise.algorithms.rebalance import rebalance_experts
from equipoise.load.synthetic import SyntheticLoad, synthetic_trace
from equipoise.placement.balancedness import balancedness, mean_balancedness
from equipoise.topology import EpTopology


def best_of(times: int, work: Callable[[], Any], clock: Callable[[], float] = time.thread_time) -> float:
    return min(seconds_of(work, clock) for _ in range(times))


def seconds_of(work: Callable[[], Any], clock: Callable[[], float] = time.thread_time) -> float:
    started = clock()
    work()
    return clock() - started


def planning_times(others: dict[str, Policy], quick: bool) -> dict[str, float]:
    """Seconds per plan. 58x256 -> 288/32/4 on one thread; 64x1024 -> 1536/512/64 wall clock on two."""
    layers, experts, topology, top_k = CONFIGURATIONS["58x256 -> 288/32/4"]
    load = SyntheticLoad(6, layers, experts, tokens_per_step=8192, top_k=top_k, drift_steps=60.0, seed=3)
    windows = synthetic_trace(load).logical_count.astype(np.float64)
    planned = rebalance_experts(windows[0], topology, algorithm="deepseek")
    own = rebalance_experts(windows[:4], topology, current=planned)
    result = {
        "equipoise, from vLLM's placement": best_of(5, lambda: ours()(topology)(windows[:5], planned)),
        "equipoise, from its own": best_of(5, lambda: ours()(topology)(windows[:5], own)),
        "equipoise, from nothing": best_of(5, lambda: rebalance_experts(windows[1:5], topology, num_threads=1)),
        "reweight": best_of(5, lambda: ours("reweight")(topology)(windows[:5], planned)),
        "deepseek (ours)": best_of(
            5, lambda: rebalance_experts(windows[4], topology, algorithm="deepseek", num_threads=1)
        ),
    }
    for name, policy in others.items():
        plan = policy(topology)
        plan(windows[:5], planned)
        result[name] = best_of(3 if name in ("vllm", "sglang deepseek") else 1, lambda p=plan: p(windows[:5], planned))
    result |= compile_times()
    if not quick:
        large = EpTopology(512, 64, 3)
        load = SyntheticLoad(5, 64, 1024, tokens_per_step=32768, top_k=8, drift_steps=60.0, seed=4)
        windows = synthetic_trace(load).logical_count.astype(np.float64)
        current = rebalance_experts(windows[0], large, algorithm="deepseek")
        one, four = windows[3], windows[:4]
        for label, load, given in (
            ("one window, from nothing", one, None),
            ("four windows, from nothing", four, None),
            ("four windows, from vLLM's placement", four, current),
        ):
            name = f"64x1024 -> 1536/512, {label}"
            work = partial(rebalance_experts, load, large, current=given, num_threads=2)
            plan = work()
            result[f"{name}, 2 threads, wall"] = best_of(2, work, time.perf_counter)
            result[f"{name}, 1 thread, CPU"] = best_of(1, partial(work, num_threads=1))
            result[f"{name}: balancedness"] = mean_balancedness(balancedness(windows[3], plan))
            result[f"{name}: next"] = mean_balancedness(balancedness(windows[4], plan))
        if "vllm" in others:
            plan = others["vllm"](large)(windows[:4], current)
            result["64x1024 -> 1536/512, vllm: balancedness"] = mean_balancedness(balancedness(windows[3], plan))
            result["64x1024 -> 1536/512, vllm: next"] = mean_balancedness(balancedness(windows[4], plan))
    return {name: float(value) for name, value in result.items()}


def compile_times() -> dict[str, float]:
    """Seconds that kernels take to compile into an empty cache, in the background, and to load from it afterwards.

    The start of those processes and their imports count. "First plan": until a server's first plan need not wait.
    """
    cold = (
        "import resource, sys, time; from equipoise.manager.warm_up import compile_kernels_in_background;"
        "start = time.perf_counter(); compiling = compile_kernels_in_background(sys.argv[1]);"
        "assert compiling.wait_until_ready(); first = time.perf_counter() - start;"
        "assert compiling.wait(); wall = time.perf_counter() - start;"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); print(first, wall, used.ru_utime + used.ru_stime)"
    )
    warm = (
        "import time, torch, numba; from equipoise.algorithms.warm_up import warm_up;"
        "start = time.perf_counter(); warm_up(); print(time.perf_counter() - start)"
    )
    with tempfile.TemporaryDirectory() as for_weights, tempfile.TemporaryDirectory() as for_batches:
        (first, wall, cpu), (first_for_batches, *_), *loads = [
            _numbers([code, *arguments], cache)
            for code, cache, *arguments in (
                (cold, for_weights, "weights"),
                (cold, for_batches, "batch"),
                (warm, for_weights),
                (warm, for_weights),
            )
        ]
    return {
        "cold compile, first plan": first,
        "cold compile, first plan for batches": first_for_batches,
        "cold compile, wall": wall,
        "cold compile, CPU": cpu,
        "warm start": min(load for (load,) in loads),
    }


def _numbers(program: list[str], cache: str) -> list[float]:
    """What a program, its code and arguments, prints, with numba's cache in ``cache``."""
    environment = os.environ | {"NUMBA_CACHE_DIR": cache}
    run = [sys.executable, "-c", *program]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    return [float(number) for number in done.stdout.split()]
