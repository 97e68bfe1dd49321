"""What goes wrong in or round the plugin in the real server, and that answers stay what they were."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helpers.sglang_runs import (
    PERIODIC,
    TWO_RANKS,
    moved_while_answering,
    rebalance,
    start,
    wait_for_kernels,
    wait_until,
)
from helpers.sglang_server import Answers, SglangServer, scheduler_pids

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(3600)]


def test_maps_without_weights_change_the_answers(qwen: Path, qwen_answers: Answers, tmp_path: Path) -> None:
    """Negative control: with the updater on copies of the weights, the comparison that all tests rest on fails."""
    with start(qwen, "full", TWO_RANKS, tmp_path, SGLANG_CPU_FAULT="copies") as server:
        assert server.answers(concurrency=2) == qwen_answers
        wait_for_kernels(server)
        assert rebalance(server)["outcome"] == "committed"
        assert server.answers(concurrency=2) != qwen_answers


def test_rank_that_cannot_attach_leaves_all_ranks_to_sglang(qwen: Path, qwen_answers: Answers, tmp_path: Path) -> None:
    """With dispatch by the batch on some ranks alone, tokens would be computed twice or not at all."""
    settings = tmp_path / "equipoise.toml"
    settings.write_text('[eplb]\nep_dispatch_algorithm = "batch"\n')
    faulty = {"SGLANG_CPU_FAULT": "attach", "EQUIPOISE_CONFIG": str(settings)}
    with start(qwen, "full", (*TWO_RANKS, PERIODIC), tmp_path, **faulty) as server:
        assert server.answers(concurrency=3) == qwen_answers
        assert server.answers(concurrency=3) == qwen_answers
        refused = server.post("/eplb/rebalance")
        assert refused.status_code == 409
        assert "attaching failed" in refused.json()["error"]["message"]


def test_error_in_a_tick_stops_balancing_and_not_the_server(qwen: Path, qwen_answers: Answers, tmp_path: Path) -> None:
    with start(qwen, "full", (*TWO_RANKS, PERIODIC), tmp_path, SGLANG_CPU_FAULT="tick") as server:
        wait_until(lambda: failed_after_more_requests(server, qwen_answers), 900, "phase failed")
        status = server.get("/eplb/status").json()
        assert "injected by a test" in status["error"]
        refused = server.post("/eplb/rebalance")
        assert refused.status_code == 409
        assert "injected by a test" in refused.json()["error"]["message"]
        assert server.answers(concurrency=2) == qwen_answers


def failed_after_more_requests(server: SglangServer, expected: Answers) -> bool:
    assert server.answers(concurrency=2) == expected
    return bool(server.get("/eplb/status").json()["phase"] == "failed")


def test_weights_loaded_anew_during_a_transfer(
    qwen: Path, other_qwen: Path, other_qwen_answers: Answers, qwen_answers: Answers, tmp_path: Path
) -> None:
    """What was staged before holds the old weights: after the reload every answer is the other model's.

    Then a scheduler is killed: SGLang ends the server, and nothing of ours keeps a process alive.
    """
    with start(qwen, "full", TWO_RANKS, tmp_path, SGLANG_CPU_FAULT="slow") as server:
        assert server.answers(concurrency=2) == qwen_answers
        wait_for_kernels(server)
        with ThreadPoolExecutor(1) as pool:
            report = pool.submit(server.post, "/eplb/rebalance")
            wait_until(lambda: server.get("/eplb/status").json()["phase"] == "migrating", 60, "a migration")
            reload_weights(server, other_qwen)
            cancelled = report.result()
            assert cancelled.status_code == 409
            assert cancelled.json()["report"]["outcome"] == "cancelled"
        assert server.answers(concurrency=2) == other_qwen_answers
        assert moved_while_answering(server, other_qwen_answers)["outcome"] in ("committed", "skipped")
        reload_weights(server, qwen)  # by SGLang's loader, which goes by the maps that we wrote
        assert server.answers(concurrency=2) == qwen_answers
        os.kill(scheduler_pids(server)[1], signal.SIGKILL)
        wait_until(lambda: server.process.poll() is not None, 120, "the end of the server")
        wait_until(lambda: not scheduler_pids(server), 60, "the end of its processes")


def reload_weights(server: SglangServer, model: Path) -> None:
    reply = server.post("/update_weights_from_disk", model_path=str(model))
    assert reply.status_code == 200, reply.text
    assert reply.json()["success"], reply.text


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--tp=2", "--ep=1", "--enable-eplb"), "--ep-size"),
        ((*TWO_RANKS, "--ep-num-redundant-experts=3"), "give 4"),
        ((*TWO_RANKS, "--tokenizer-worker-num=2"), "--tokenizer-worker-num"),
    ],
)
def test_launch_that_cannot_work_ends_with_one_line(
    flags: tuple[str, ...], says: str, qwen: Path, tmp_path: Path
) -> None:
    server = SglangServer(qwen, flags, log=tmp_path / "server.log", plugins=["equipoise"])
    with pytest.raises(RuntimeError, match="did not start"), server:
        pass
    last = server.lines()[-1]
    assert last.startswith("equipoise: ")
    assert says in last
    assert "Traceback" not in server.log.read_text()
