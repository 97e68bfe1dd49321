"""The child process that compiles kernels, and that it compiles all of them."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from equipoise.jit.warming import warm_up_in_background

_SLOW_COMPILER = """
import fcntl, os, time
held = open({lock!r}, "w")
fcntl.flock(held, fcntl.LOCK_EX)
open({started!r}, "w").close()
time.sleep(60)
"""
_SLOW_FORKS = """
import fcntl, os, time
from equipoise.jit.warming import compile_side_by_side
def share():
    held = open({lock!r}, "w")
    fcntl.flock(held, fcntl.LOCK_EX)
    open({started!r}, "w").close()
    time.sleep(60)
compile_side_by_side([share])
"""
_PARENT = """
import sys, threading
from equipoise.jit.warming import warm_up_in_background
threading.Thread(target=warm_up_in_background, args=("slow_compiler",)).start()
sys.stdin.read()
"""
_SHARES = """
import os
from equipoise.jit.warming import compile_side_by_side
mine, (there, back) = os.getpid(), os.pipe()
def good(): os.write(back, b"%d " % os.getpid())
def bad(): raise ValueError("this share fails")
assert compile_side_by_side([good, good]) is True
assert compile_side_by_side([bad, good]) is False
os.close(back)
processes = os.read(there, 1000).split()
assert len({*processes, b"%d" % mine}) == 4, processes
"""
_PRIORITIES = """
import os
from equipoise.jit.compile import kernel
from equipoise.jit.warming import compile_side_by_side
@kernel
def doubled(number):
    return 2 * number
there, back = os.pipe()
def share():
    before = os.nice(0)
    doubled(1)
    os.write(back, b"%d " % (os.nice(0) - before))
assert compile_side_by_side([share]) and compile_side_by_side([share])
print(os.read(there, 100).decode())
"""
_REBALANCE = """
import gc, time
import numpy as np
from numba.core.dispatcher import Dispatcher
from equipoise import EpTopology, ExpertLocationMetadata
from equipoise.algorithms.rebalance import rebalance_experts
from equipoise.algorithms.registry import available_algorithms, find_algorithm
from equipoise.config import EplbConfig
from equipoise.manager.warm_up import compile_kernels
from equipoise.manager.planning import plan_rebalance
from equipoise.transfer.planning.rank_program import rank_program

def loaded():
    kernels = [each for each in gc.get_objects() if isinstance(each, Dispatcher)]
    return {(kernel.py_func.__name__, str(types)) for kernel in kernels for types in kernel.overloads}

compile_kernels()
before = loaded()
assert before
topology = EpTopology.for_experts(16, 8, 4, 2)
current = ExpertLocationMetadata.trivial(3, 16, topology, max_replicas=9)
windows = np.random.default_rng(3).integers(0, 50, (2, 3, 16))
for algorithm in available_algorithms():
    for staged in (1, 6):
        planned = plan_rebalance(
            windows, current, EplbConfig(ep_num_redundant_experts=8), algorithm=algorithm, request=None,
            window_steps=2, num_groups=None, max_staged_experts=staged, clock=time.perf_counter,
        )
        transfer = getattr(planned, "transfer", None)
        assert transfer is not None or algorithm in ("reweight", "static"), algorithm
        for layer in transfer.layers if transfer is not None else ():
            for batch in layer.batches:
                rank_program(batch, 1, topology)
    for dispatch in find_algorithm(algorithm).dispatch:
        for load in (windows, windows[0] / 3.0):
            for placement in (None, current):
                rebalance_experts(
                    load, topology, algorithm=algorithm, current=placement, dispatch=dispatch, tokens_per_step=64
                )
print("missing:", *sorted(loaded() - before))
"""


@pytest.mark.parametrize("compiler", [_SLOW_COMPILER, _SLOW_FORKS], ids=["child", "what it forked"])
def test_the_child_ends_when_its_parent_is_killed(tmp_path: Path, compiler: str) -> None:
    lock, started = tmp_path / "lock", tmp_path / "started"
    (tmp_path / "slow_compiler.py").write_text(compiler.format(lock=str(lock), started=str(started)))
    search_path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT], stdin=subprocess.PIPE, env={**os.environ, "PYTHONPATH": search_path}
    )
    try:
        assert _within(60, started.exists)
        time.sleep(0.2)  # the thread that started the child is long gone: the child outlives a thread, not a process
        assert not _is_free(lock)
    finally:
        parent.kill()
        parent.communicate()
    assert _within(5, lambda: _is_free(lock)), "the child outlives its parent"


def test_cancel_ends_what_the_child_forked(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    lock, started = tmp_path / "lock", tmp_path / "started"
    (tmp_path / "slow_compiler.py").write_text(_SLOW_FORKS.format(lock=str(lock), started=str(started)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    under_way = warm_up_in_background("slow_compiler")
    try:
        assert _within(60, started.exists)
        assert not _is_free(lock)
        assert not under_way.done
    finally:
        under_way.cancel()
    assert under_way.done
    assert _within(5, lambda: _is_free(lock)), "what the child forked outlives it"


def test_shares_are_compiled_in_processes_of_their_own_and_one_failure_is_told() -> None:
    """In a process of its own, too: this one has threads, and should not fork."""
    done = subprocess.run([sys.executable, "-P", "-c", _SHARES], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "ValueError: this share fails" in done.stderr


def test_a_share_lowers_its_priority_when_it_compiles_and_not_when_it_loads(tmp_path: Path) -> None:
    program = tmp_path / "program.py"  # numba caches what lies in a file
    program.write_text(_PRIORITIES)
    done = subprocess.run([sys.executable, "-P", str(program)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["10", "0"]


def test_the_child_imports_nothing_from_the_current_directory(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "numpy.py").write_text("raise SystemExit('this is not numpy')")
    (tmp_path / "small_compiler.py").write_text("import numpy; assert numpy.__version__")
    monkeypatch.chdir(tmp_path)
    assert warm_up_in_background("small_compiler").wait(60) is False, "not even the module itself"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "small_compiler.py").rename(tmp_path / "elsewhere" / "small_compiler.py")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "elsewhere"))
    assert warm_up_in_background("small_compiler").wait(60)


def test_a_rebalance_after_the_warm_up_finds_every_kernel_loaded() -> None:
    """In a process of its own: what other tests have used before must not count, nor what lies in numba's cache."""
    done = subprocess.run([sys.executable, "-P", "-c", _REBALANCE], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["missing:"]


def _within(seconds: float, condition) -> bool:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _is_free(lock: Path) -> bool:
    with lock.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
