"""Algorithms of other packages: by decorator, by entry point; what an algorithm cannot honour is refused."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from equipoise.algorithms import registry
from equipoise.algorithms.problem import PlacementProblem, Solution
from equipoise.algorithms.rebalance import rebalance_experts
from equipoise.algorithms.registry import available_algorithms, find_algorithm, register
from equipoise.errors import ConfigError
from equipoise.load.trace import LoadTrace
from equipoise.replay.simulate import replay
from equipoise.topology import EpTopology

_MODULE = """
import numpy as np
from equipoise.algorithms.problem import Solution
from equipoise.algorithms.registry import register

@register("round_robin", history=1)
def solve(problem):
    slots = np.arange(problem.topology.num_slots) % problem.num_logical_experts
    return Solution(np.tile(slots, (problem.num_layers, 1)))
"""
_LIST = "from equipoise import available_algorithms; print(*available_algorithms())"


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_known", dict(registry._known))


def contiguous(problem: PlacementProblem) -> Solution:
    slots = np.arange(problem.topology.num_slots) % problem.num_logical_experts
    return Solution(np.tile(slots, (problem.num_layers, 1)))


@pytest.mark.usefixtures("known")
def test_a_decorated_function_is_an_algorithm_for_planning_replay_and_oracle() -> None:
    register("mine", history=3)(contiguous)
    topology = EpTopology(4, 1, 3)
    assert "mine" in available_algorithms()
    plan = rebalance_experts(np.ones((2, 8)), topology, algorithm="mine")
    assert plan.physical_to_logical_map.tolist() == [[p % 8 for p in range(12)]] * 2
    trace = LoadTrace(np.random.default_rng(0).integers(1, 50, (6, 2, 8)))
    result = replay(trace, topology, "mine", window=1)
    assert result.history == 3
    assert "mine" in result.oracle_algorithms


@pytest.mark.usefixtures("known")
def test_a_name_is_taken_once() -> None:
    register("mine")(contiguous)
    assert register("mine")(contiguous) is contiguous  # a module that is imported twice
    with pytest.raises(ConfigError, match="'equipoise' is registered already"):
        register("equipoise")(contiguous)
    with pytest.raises(ConfigError, match="'auto' is registered already"):
        register("auto")(contiguous)


def test_every_process_finds_the_algorithms_of_installed_packages(tmp_path: Path) -> None:
    """One package that fails on import takes nothing down."""
    (tmp_path / "their_placement.py").write_text(_MODULE)
    (tmp_path / "broken_placement.py").write_text("raise RuntimeError('no licence')")
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[equipoise.algorithms]\nbroken = broken_placement\nround_robin = their_placement\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", _LIST], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "round_robin" in done.stdout.split()
    assert "equipoise" in done.stdout.split()
    assert "broken = broken_placement left out: no licence" in done.stderr


@pytest.mark.parametrize("algorithm", ["deepseek", "deepseek_hierarchical"])
def test_ranks_of_different_speed_are_refused_by_planners_of_one_speed(algorithm: str) -> None:
    topology, load = EpTopology(4, 2, 3), np.ones((1, 8))
    with pytest.raises(ConfigError, match=r"knows only ranks of one speed.*\[1.0, 0.0, 1.0, 1.0\]") as caught:
        rebalance_experts(load, topology, algorithm=algorithm, rank_capacity=[1, 0, 1, 1])
    assert caught.value.field == "rank_capacity"
    rebalance_experts(load, topology, algorithm=algorithm, rank_capacity=[2, 2, 2, 2])


def test_weights_alone_are_no_plan_for_a_host_without_weights() -> None:
    with pytest.raises(ConfigError, match="reweight plans for dispatch weights, got dispatch='even'"):
        rebalance_experts(np.ones((1, 8)), EpTopology(4, 1, 3), algorithm="reweight", dispatch="even")


@pytest.mark.parametrize(("field", "value"), [("dispatch", "odd"), ("tokens_per_step", 0)])
def test_options_that_make_no_sense_are_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=repr(value)) as caught:
        rebalance_experts(np.ones((1, 8)), EpTopology(4, 1, 3), **{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field


@pytest.mark.parametrize(("algorithm", "groups"), [("equipoise", 3), ("deepseek_hierarchical", 3), ("deepseek", 4)])
def test_groups_that_cannot_be_kept_are_said(algorithm: str, groups: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "equipoise.algorithms"):
        rebalance_experts(np.ones((1, 12)), EpTopology(4, 2, 4), algorithm=algorithm, num_groups=groups)
    assert f"num_groups={groups}" in caplog.text


def test_auto_is_the_default_algorithm() -> None:
    assert find_algorithm("auto").name == "equipoise"
