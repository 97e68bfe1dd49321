"""The plugin in the real, unmodified SGLang server: every greedy answer is that of one rank without the plugin."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from equipoise.manager.reports import Phase
from helpers.sglang_runs import (
    EPLB,
    PERIODIC,
    SERIAL,
    TWO_RANKS,
    calls_of_ranks,
    moved_while_answering,
    rebalance,
    start,
    wait_for_kernels,
    wait_until,
)
from helpers.sglang_server import Answers, SglangServer

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(3600)]

SCHEDULER_HOOKS = {
    "eplb.eplb_manager.EPLBManager",
    "eplb.expert_distribution._StatAccumulator.append",
    "managers.scheduler.Scheduler.ingest_requests",
    "managers.scheduler.Scheduler.init_request_dispatcher",
    "model_executor.model_runner.ModelRunner.initialize",
}


def test_algorithm_level_plans_sglangs_own_rebalances(qwen: Path, qwen_answers: Answers, tmp_path: Path) -> None:
    with start(qwen, "algorithm", (*TWO_RANKS, PERIODIC, SERIAL), tmp_path) as server:
        for _ in range(2):
            assert server.answers(concurrency=2) == qwen_answers
    planned = [line for line in server.lines() if "planned by equipoise" in line]
    assert len(planned) >= 4  # on both ranks, in more than one rebalance
    assert len(planned) % 2 == 0
    assert any("0 experts move" not in line for line in planned)
    assert not [line for line in server.lines() if "planned differently" in line]
    seconds = [float(line.split(" s: ")[0].rsplit(" ", 1)[1]) for line in planned]
    assert max(seconds) < 5  # compiling takes longer than that
    agree = calls_of_ranks(tmp_path, "eplb.eplb_manager.EPLBManager._compute_expert_location_metadata")
    assert len(agree) == 2


@pytest.mark.parametrize("level", ["manager", "full"])
def test_own_manager_moves_experts_while_answering_and_while_idle(
    level: str, qwen: Path, qwen_answers: Answers, tmp_path: Path
) -> None:
    """With the overlap schedule, SGLang's default."""
    with start(qwen, level, (*TWO_RANKS, "--enable-metrics"), tmp_path) as server:
        assert server.answers(concurrency=2) == qwen_answers
        wait_for_kernels(server)
        busy = moved_while_answering(server, qwen_answers)
        assert busy["outcome"] == "committed"
        assert sum(busy["moves"]) > 0
        idle = rebalance(server, algorithm="deepseek")
        assert idle["outcome"] in ("committed", "skipped")
        assert server.answers(concurrency=2) == qwen_answers
        check_operators_routes(server)
        metrics = server.get("/metrics").text
        check_hooks(tmp_path, num_ranks=2)
    assert 'equipoise_rebalances_total{outcome="committed"}' in metrics
    assert sum(f'equipoise_phase{{phase="{phase}"}} 1.0' in metrics for phase in get_args(Phase)) == 1
    assert all(f'equipoise_balancedness{{layer="{layer}"}}' in metrics for layer in range(3))


def check_operators_routes(server: SglangServer) -> None:
    status = server.get("/eplb/status").json()
    assert status["phase"] in ("collecting", "planning", "migrating")
    assert (status["num_ranks"], status["num_physical_experts"], status["layer_ids"]) == (2, 12, [0, 1, 2])
    assert status["totals"]["by_outcome"]["committed"] >= 1
    location = server.get("/eplb/expert_location").json()
    assert [sorted(set(row)) for row in location["physical_to_logical_map"]] == [list(range(8))] * 3
    initial = server.get("/eplb/init_expert_location").json()
    assert initial == {"physical_to_logical_map": location["physical_to_logical_map"]}
    refused = server.post("/eplb/rebalance", algorithm="nonsense")
    assert refused.status_code == 400
    assert refused.json()["error"]["field"] == "algorithm"
    assert server.post("/eplb/rebalance", algorithm=3).status_code == 400


def check_hooks(directory: Path, *, num_ranks: int) -> None:
    """Each hook ran in each scheduler, and those that go with passes equally often."""
    ranks = calls_of_ranks(directory, "eplb.eplb_manager.EPLBManager")
    assert len(ranks) == num_ranks
    for calls in ranks:
        assert set(calls) >= SCHEDULER_HOOKS
        passes = calls["eplb.expert_distribution._StatAccumulator.append"]
        assert abs(passes - calls["eplb.eplb_manager.EPLBManager"]) <= 1  # a file may be half a second old


def test_dispatch_by_the_batch(qwen: Path, qwen_answers: Answers, tmp_path: Path) -> None:
    """Ours in place of SGLang's `dynamic`: all ranks see all tokens here, and must choose alike."""
    settings = tmp_path / "equipoise.toml"
    settings.write_text('[eplb]\nep_dispatch_algorithm = "batch"\n')
    with start(qwen, "full", TWO_RANKS, tmp_path, EQUIPOISE_CONFIG=str(settings)) as server:
        assert server.answers(concurrency=3) == qwen_answers
        wait_for_kernels(server)
        assert moved_while_answering(server, qwen_answers)["outcome"] in ("committed", "skipped")
        assert rebalance(server, algorithm="deepseek", move_price=0)["outcome"] in ("committed", "skipped")
        assert server.answers(concurrency=3) == qwen_answers
        check_hooks(tmp_path, num_ranks=2)
    chosen = calls_of_ranks(tmp_path, "eplb.expert_location_dispatch.topk_ids_logical_to_physical")
    assert len(chosen) == 2


def test_four_ranks(qwen: Path, qwen_answers: Answers, tmp_path: Path) -> None:
    """With periodic rebalances, which come while requests run."""
    with start(qwen, "full", ("--tp=4", "--ep=4", PERIODIC, *EPLB), tmp_path) as server:
        wait_until(lambda: committed_after_more_requests(server, qwen_answers), 1200, "a rebalance")
        assert server.answers(concurrency=2) == qwen_answers
        check_hooks(tmp_path, num_ranks=4)


def committed_after_more_requests(server: SglangServer, expected: Answers) -> bool:
    assert server.answers(concurrency=3) == expected
    return bool(server.get("/eplb/status").json()["num_rebalances"])


def test_data_parallel_attention(qwen: Path, qwen_answers: Answers, tmp_path: Path) -> None:
    flags = (*TWO_RANKS, "--dp-size=2", "--enable-dp-attention", SERIAL)
    with start(qwen, "full", flags, tmp_path) as server:
        wait_for_kernels(server)
        assert moved_while_answering(server, qwen_answers)["outcome"] == "committed"
        assert rebalance(server)["outcome"] in ("committed", "skipped")
        assert server.answers(concurrency=2) == qwen_answers
        check_hooks(tmp_path, num_ranks=2)


def test_model_with_a_dense_layer(deepseek: Path, deepseek_answers: Answers, tmp_path: Path) -> None:
    with start(deepseek, "full", TWO_RANKS, tmp_path) as server:
        wait_for_kernels(server)
        report = moved_while_answering(server, deepseek_answers)
        assert report["outcome"] == "committed"
        assert report["layer_ids"] == [1, 2, 3]  # SGLang's numbers
        assert server.answers(concurrency=2) == deepseek_answers
