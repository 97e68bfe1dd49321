"""Compiling ahead of the first plan: what it waits for, and what the log says of it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from equipoise.jit.warming import warm_up_in_background
from equipoise.manager.warm_up import load_compiled_kernels

_FIRST_PLAN = """
import gc, sys, time
import numpy as np
from numba.core.dispatcher import Dispatcher
from equipoise import EpTopology, ExpertLocationMetadata
from equipoise.config import EplbConfig
from equipoise.manager.planning import plan_rebalance
from equipoise.manager.warm_up import compile_first_kernels
from equipoise.transfer.planning.rank_program import rank_program

def loaded():
    kernels = [each for each in gc.get_objects() if isinstance(each, Dispatcher)]
    return {(kernel.py_func.__name__, str(types)) for kernel in kernels for types in kernel.overloads}

dispatch = sys.argv[1]
compile_first_kernels(dispatch)
before = loaded()
topology = EpTopology.for_experts(16, 8, 4, 2)
current = ExpertLocationMetadata.trivial(3, 16, topology, max_replicas=9)
moved = 0
for windows in (1, 2, 8):
    for kind in ("shift", "steady"):
        load = np.random.default_rng(3).poisson(200.0 * np.arange(1, 17), (windows, 3, 16))
        load = np.random.default_rng(3).integers(0, 50, load.shape) if kind == "shift" else load
        for staged in (1, 6):
            planned = plan_rebalance(
                load, current, EplbConfig(ep_num_redundant_experts=8), algorithm="auto", request=None, window_steps=2,
                num_groups=None, max_staged_experts=staged, clock=time.perf_counter, dispatch=dispatch,
            )
            transfer = getattr(planned, "transfer", None)
            for layer in transfer.layers if transfer is not None else ():
                for batch in layer.batches:
                    rank_program(batch, 1, topology)
                    moved += 1
assert moved
print("missing:", *sorted(name for name, _ in loaded() - before))
print("of", len(before), "improve_for_batches" in str(before))
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    return tmp_path / "odd_compiler.py"


def test_a_compiler_that_fails_is_warned_of_with_its_last_words(
    compiler: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiler.write_text("raise RuntimeError('no room for a cache')")
    load_compiled_kernels(warm_up_in_background("odd_compiler"), "weights")
    assert "compiling kernels ahead failed" in caplog.text
    assert "exit status 1" in caplog.text
    assert "RuntimeError: no room for a cache" in caplog.text


def test_so_are_the_words_of_what_it_forked(compiler: Path, caplog: pytest.LogCaptureFixture) -> None:
    compiler.write_text(
        "import sys\nfrom equipoise.jit.warming import compile_side_by_side\n"
        "def share(): raise RuntimeError('this share fails')\n"
        "sys.exit(0 if compile_side_by_side([share]) else 1)"
    )
    load_compiled_kernels(warm_up_in_background("odd_compiler"), "weights")
    assert "RuntimeError: this share fails" in caplog.text


def test_one_that_is_cancelled_is_no_failure(compiler: Path, caplog: pytest.LogCaptureFixture) -> None:
    compiler.write_text("import time\ntime.sleep(60)")
    compiling = warm_up_in_background("odd_compiler")
    waiting = threading.Thread(target=load_compiled_kernels, args=(compiling, "weights"))
    waiting.start()
    compiling.cancel()
    waiting.join(30)
    assert not waiting.is_alive()
    assert caplog.text == ""


def test_a_first_plan_waits_for_what_it_needs_and_not_for_the_rest(
    compiler: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    go = compiler.parent / "go"
    compiler.write_text(
        "import os, time\nfrom equipoise.jit.warming import say_ready\n"
        f"while not os.path.exists({str(go)!r}): time.sleep(0.01)\n"
        "say_ready()\ntime.sleep(60)"
    )
    compiling = warm_up_in_background("odd_compiler")
    waiting = threading.Thread(target=load_compiled_kernels, args=(compiling, "weights"))
    try:
        waiting.start()
        time.sleep(0.5)
        assert waiting.is_alive()
        assert not compiling.ready
        go.touch()
        waiting.join(240)
        assert not waiting.is_alive()
        assert compiling.ready
        assert not compiling.done
        assert "kernels of planning and transfer are ready" in caplog.text
    finally:
        compiling.cancel()


@pytest.mark.parametrize("dispatch", ["weights", "even", "batch"])
def test_what_is_compiled_first_is_all_that_a_first_plan_needs(dispatch: str) -> None:
    """In a process of its own: what other tests have used before must not count, nor what lies in numba's cache."""
    run = [sys.executable, "-P", "-c", _FIRST_PLAN, dispatch]
    done = subprocess.run(run, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    missing, loaded = done.stdout.splitlines()
    assert missing == "missing:"
    assert loaded.endswith("True" if dispatch == "batch" else "False"), "kernels of batches only where they are used"


def test_a_dispatch_that_there_is_not_is_refused() -> None:
    run = [sys.executable, "-P", "-m", "equipoise.manager.warm_up", "odd"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "dispatch must be one of even, weights, batch, got 'odd'" in done.stderr


@pytest.mark.parametrize(("arguments", "told"), [(["batch"], "ready\n"), ([], "")], ids=["behind a server", "by hand"])
def test_the_program_tells_a_server_and_nobody_else_that_it_is_ready(arguments: list[str], told: str) -> None:
    run = [sys.executable, "-P", "-m", "equipoise.manager.warm_up", *arguments]
    done = subprocess.run(run, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout == told
