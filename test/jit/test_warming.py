"""Kernels are compiled by a child process, so that no step waits for a compiler."""

from __future__ import annotations

import subprocess
import sys

import pytest

from equipoise.algorithms.warm_up import warm_up
from equipoise.jit import warming
from equipoise.jit.warming import WarmUp, warm_up_in_background


def test_a_child_process_fills_the_cache():
    under_way = warm_up_in_background()
    try:
        assert under_way.wait(timeout=240)
        assert under_way.done
    finally:
        under_way.cancel()


def test_waiting_gives_up_after_the_timeout(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/sleep")  # its arguments are no times: it fails at once
    failed = warm_up_in_background()
    assert failed.wait(timeout=30) is False
    slow = WarmUp(warming.subprocess.Popen([sys.executable, "60"]))
    assert slow.wait(timeout=0.05) is False
    assert not slow.done
    slow.cancel()
    assert slow.done


def test_every_kernel_that_a_plan_needs_is_warm():
    """A plan after the warm-up, with every option, compiles nothing."""
    import numpy as np
    from numba.core import event

    from equipoise.algorithms.rebalance import rebalance_experts
    from equipoise.algorithms.registry import available_algorithms
    from equipoise.topology import EpTopology

    warm_up()
    compiled = []

    class Listener(event.Listener):
        def on_start(self, recorded):
            compiled.append(recorded.data["dispatcher"].py_func.__name__)

        def on_end(self, recorded):
            pass

    listener = Listener()
    event.register("numba:compile", listener)
    try:
        topology = EpTopology(8, 2, 4)
        for algorithm in available_algorithms():
            current = None
            steady = np.random.default_rng(0).poisson(200.0 * np.arange(1, 17), (8, 3, 16))
            for load in (np.ones((3, 16), dtype=np.int32), np.random.default_rng(0).random((5, 3, 16)), steady):
                current = rebalance_experts(
                    load, topology, algorithm=algorithm, current=current, num_groups=4, max_moves_per_layer=3
                )
            if algorithm in ("equipoise", "reweight"):
                rebalance_experts(
                    load[:, ::-1, ::-1], topology, algorithm=algorithm, rank_capacity=[1, 2, 1, 1, 1, 1, 1, 1]
                )
    finally:
        event.unregister("numba:compile", listener)
    assert compiled == []


def test_the_compiling_child_does_not_wait_for_torch():
    """Its import would take as long as a fifth of the solvers' kernels."""
    code = "import sys, equipoise.algorithms.warm_up, equipoise.manager.warm_up; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)


def test_vector_loops_are_left_out_only_where_that_is_asked_for(monkeypatch):
    import numba

    from equipoise.jit.compile import for_short_loops

    monkeypatch.setattr(numba.config, "LOOP_VECTORIZE", 1)
    seen = []

    @for_short_loops()
    def compile_something():
        seen.append(numba.config.LOOP_VECTORIZE)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        compile_something()
    assert seen == [0]
    assert numba.config.LOOP_VECTORIZE == 1
