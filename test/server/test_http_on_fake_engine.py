"""What the server does when the engine dies, hangs or refuses, and what a client that leaves brings about."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from equipoise.admin.codec import jsonable
from equipoise.config import EngineConfig, HttpConfig, ServeConfig
from equipoise.engine.step_log import GetSteps, StepRecord
from equipoise.errors import ConfigError, PhaseError, TransferError
from equipoise.manager.commands import DumpRecording, Rebalance, StartRecording, StopRecording
from equipoise.server.app import create_app
from helpers.fake_engine import REPORT, FakeEngine
from helpers.http_server import error_of, running_server, sse_events

CONFIG = ServeConfig(EngineConfig("a/model"), http=HttpConfig(dump_dir="dumps"))


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[httpx.Client]:
    with running_server(create_app(engine, CONFIG)) as client:
        yield client


def wait_until(condition: object, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.01)


class TestDeadEngine:
    def test_health_says_why(self, engine: FakeEngine, client: httpx.Client) -> None:
        assert client.get("/health").status_code == 200
        engine.error = "rank 1 was killed"
        assert "rank 1 was killed" in error_of(client.get("/health"), 503)

    @pytest.mark.parametrize(
        ("path", "body"),
        [("/generate", {"text": "ab"}), ("/generate", {"text": "ab", "stream": True}), ("/eplb/rebalance", {})],
    )
    def test_calls_answer_503(self, engine: FakeEngine, client: httpx.Client, path: str, body: dict) -> None:
        engine.error = "rank 1 was killed"
        assert "rank 1 was killed" in error_of(client.post(path, json=body), 503)

    def test_death_in_a_stream_is_its_last_event(self, engine: FakeEngine, client: httpx.Client) -> None:
        engine.die_after = 2
        events = sse_events(client, "/generate", {"text": "ab", "stream": True})
        assert [event.get("text") for event in events] == ["$", "$%", None]
        assert "rank 1 was killed" in events[-1]["error"]["message"]

    def test_metrics_outlive_it(self, engine: FakeEngine, client: httpx.Client) -> None:
        assert "equipoise_engine_up 1.0" in client.get("/metrics").text
        engine.error = "rank 1 was killed"
        response = client.get("/metrics")
        assert response.status_code == 200
        assert "equipoise_engine_up 0.0" in response.text
        assert "equipoise_balancedness_mean 0.75" in response.text


class TestClientThatLeaves:
    def test_stream_is_aborted(self, engine: FakeEngine, client: httpx.Client) -> None:
        engine.delay = 0.02
        body = {"text": "ab", "rid": "gone", "stream": True, "sampling_params": {"max_new_tokens": 10_000}}
        with client.stream("POST", "/generate", json=body) as response:
            next(response.iter_lines())
        wait_until(lambda: engine.aborted == ["gone"])
        wait_until(lambda: "equipoise_running_requests 0.0" in client.get("/metrics").text)

    @pytest.mark.parametrize("stream", [False, True])
    def test_request_without_a_first_token_is_aborted(
        self, engine: FakeEngine, client: httpx.Client, stream: bool
    ) -> None:
        engine.delay = 3600
        body = {"text": ["ab", "cd"], "rid": ["one", "two"], "stream": stream}
        with pytest.raises(httpx.ReadTimeout):
            client.post("/generate", json=body, timeout=0.3)
        wait_until(lambda: sorted(engine.aborted) == ["one", "two"])

    def test_finished_request_is_not_aborted(self, engine: FakeEngine, client: httpx.Client) -> None:
        sse_events(client, "/generate", {"text": "ab", "rid": "done", "stream": True})
        assert engine.finished == ["done"]
        assert engine.aborted == []


class TestBatch:
    def test_one_bad_prompt_aborts_the_others(self, engine: FakeEngine, client: httpx.Client) -> None:
        engine.delay = 0.02
        body = {
            "input_ids": [[1, 2], [1] * 65],
            "rid": ["good", "bad"],
            "sampling_params": {"max_new_tokens": 10_000},
        }
        assert "65 tokens" in error_of(client.post("/generate", json=body), 400, "input_ids")
        wait_until(lambda: "good" in engine.aborted)

    def test_streamed_events_carry_their_index(self, client: httpx.Client) -> None:
        body = {"text": ["a", "bc"], "stream": True, "sampling_params": {"max_new_tokens": 3}}
        events = sse_events(client, "/generate", body)
        assert sorted(event["index"] for event in events) == [0, 0, 0, 1, 1, 1]
        last = {event["index"]: event for event in events}
        assert all(event["meta_info"]["finish_reason"] == {"type": "length", "length": 3} for event in last.values())

    def test_running_rid_is_refused(self, engine: FakeEngine, client: httpx.Client) -> None:
        engine.delay = 0.05
        body = {"text": "ab", "rid": "mine", "stream": True, "sampling_params": {"max_new_tokens": 10_000}}
        with client.stream("POST", "/generate", json=body) as response:
            lines = response.iter_lines()  # held: dropping it closes the response
            next(lines)
            assert "'mine' is already running" in error_of(client.post("/generate", json=body), 400, "rid")


class TestAnswers:
    def test_one_rid_for_a_batch_is_numbered(self, client: httpx.Client) -> None:
        body = {"text": ["a", "b"], "rid": "mine", "sampling_params": {"max_new_tokens": 1}}
        answers = client.post("/generate", json=body).json()
        assert [answer["meta_info"]["id"] for answer in answers] == ["mine_0", "mine_1"]

    def test_a_refused_prompt_has_the_name_the_client_gave_it(self, client: httpx.Client) -> None:
        assert error_of(client.post("/v1/completions", json={"prompt": "a" * 65}), 400, "prompt").startswith("prompt: ")
        error_of(client.post("/generate", json={"text": "a" * 65}), 400, "text")
        error_of(client.post("/generate", json={"input_ids": [1] * 65, "stream": True}), 400, "input_ids")

    @pytest.mark.parametrize("wanted", [True, False, None])
    def test_a_stream_tells_its_usage_if_asked(self, client: httpx.Client, wanted: bool | None) -> None:
        body = {"prompt": "abc", "max_tokens": 2, "stream": True}
        if wanted is not None:
            body["stream_options"] = {"include_usage": wanted}
        events = sse_events(client, "/v1/completions", body)
        assert [event["choices"][0]["text"] for event in events if event["choices"]] == ["$", "%"]
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        assert [event["usage"] for event in events if "usage" in event] == ([usage] if wanted else [])

    def test_what_json_has_no_word_for_is_null(self) -> None:
        value = {"a": float("nan"), 1: (float("inf"), 2.0), "b": StepRecord(3, float("-inf"), 4, "planning")}
        step = {"forward_pass_id": 3, "seconds": None, "num_tokens": 4, "phase": "planning"}
        assert jsonable(value) == {"a": None, "1": [None, 2.0], "b": step}


class TestAdmin:
    def test_rebalance_hands_over_its_options(self, engine: FakeEngine, client: httpx.Client) -> None:
        body = {"algorithm": "deepseek", "dry_run": True, "max_moves_per_layer": 4}
        assert client.post("/eplb/rebalance", json=body).json()["outcome"] == "dry_run"
        assert engine.commands == [Rebalance("deepseek", True, 4)]

    def test_report_is_whole(self, client: httpx.Client) -> None:
        report = client.post("/eplb/rebalance").json()
        assert report == {**dataclasses.asdict(REPORT), "bytes_moved": 30}

    def test_failed_migration_is_a_500_with_the_report(self, engine: FakeEngine, client: httpx.Client) -> None:
        engine.report = dataclasses.replace(REPORT, outcome="failed", error="rank 1: canary 3 is not 5")
        response = client.post("/eplb/rebalance")
        assert response.status_code == 500
        assert response.json()["error"]["message"] == "rank 1: canary 3 is not 5"
        assert response.json()["report"]["outcome"] == "failed"
        assert response.json()["error"]["code"] == 500
        engine.report = dataclasses.replace(REPORT, outcome="cancelled", error="paused")
        response = client.post("/eplb/rebalance")
        assert (response.status_code, response.json()["error"]["code"]) == (409, 409)

    @pytest.mark.parametrize(
        ("error", "status", "field"),
        [
            (PhaseError("a rebalance is running"), 409, None),
            (ConfigError("algorithm must be one of a, b", field="algorithm"), 400, "algorithm"),
            (TransferError("a peer left"), 500, None),
        ],
    )
    def test_errors_of_commands(
        self, engine: FakeEngine, client: httpx.Client, error: Exception, status: int, field: str | None
    ) -> None:
        engine.raises = error  # type: ignore[assignment]
        assert error_of(client.post("/eplb/rebalance"), status, field) == str(error)

    def test_recording(self, engine: FakeEngine, client: httpx.Client) -> None:
        for call in ("start", "stop"):
            assert client.post(f"/{call}_expert_distribution_record").status_code == 200
        reply = client.post("/dump_expert_distribution_record").json()
        assert reply == {"path": "dumps/dump.pt", "num_steps": 3, "num_tokens": 12}
        assert engine.commands == [StartRecording(directory="dumps"), StopRecording(), DumpRecording("dumps")]

    def test_state_never_changes_by_get(self, engine: FakeEngine, client: httpx.Client) -> None:
        for path in (
            "/start_expert_distribution_record",
            "/stop_expert_distribution_record",
            "/dump_expert_distribution_record",
            "/eplb/rebalance",
        ):
            error_of(client.get(path), 405)
        assert engine.commands == []

    def test_steps_since(self, engine: FakeEngine, client: httpx.Client) -> None:
        ids = [step["forward_pass_id"] for step in client.get("/eplb/steps", params={"since": 3}).json()]
        assert ids == [3, 4]
        assert engine.commands == [GetSteps(3)]
        assert "'x'" in error_of(client.get("/eplb/steps", params={"since": "x"}), 400, "since")


class TestMetrics:
    def test_figures(self, engine: FakeEngine, client: httpx.Client) -> None:
        client.post("/generate", json={"text": "abc", "sampling_params": {"max_new_tokens": 4}})
        client.post("/generate", json={"input_ids": [1] * 65})
        engine.totals = engine.totals.plus(REPORT)
        for _ in range(2):  # a second scrape counts nothing twice
            text = client.get("/metrics").text
        for line in (
            'equipoise_requests_total{finish_reason="length"} 1.0',
            'equipoise_requests_total{finish_reason="refused"} 1.0',
            "equipoise_prompt_tokens_total 3.0",
            "equipoise_generated_tokens_total 4.0",
            "equipoise_running_requests 0.0",
            "equipoise_balancedness_mean 0.75",
            'equipoise_balancedness{layer="0"} 0.75',
            'equipoise_phase{phase="collecting"} 1.0',
            'equipoise_phase{phase="migrating"} 0.0',
            'equipoise_rebalances_total{outcome="committed"} 1.0',
            'equipoise_rebalances_total{outcome="failed"} 0.0',
            "equipoise_moves_total 2.0",
            "equipoise_cross_node_moves_total 1.0",
            "equipoise_moved_bytes_total 30.0",
            "equipoise_stall_seconds_total 0.005",
            'equipoise_steps_total{phase="collecting"} 5.0',
            "equipoise_step_tokens_total 20.0",
            'equipoise_step_seconds_count{phase="collecting"} 5.0',
            'equipoise_step_seconds_sum{phase="collecting"} 0.05',
            'equipoise_step_seconds_bucket{le="0.01",phase="collecting"} 3.0',
            'equipoise_step_seconds_bucket{le="0.1",phase="collecting"} 5.0',
            'equipoise_step_seconds_bucket{le="+Inf",phase="collecting"} 5.0',
        ):
            assert line in text.splitlines()
        assert 'layer="1"' not in text, "a layer without tokens has no balancedness"

    def test_nothing_between_two_scrapes_is_lost(self, engine: FakeEngine, client: httpx.Client) -> None:
        assert "equipoise_moves_total 0.0" in client.get("/metrics").text.splitlines()
        failed = dataclasses.replace(REPORT, outcome="failed", bytes_received_per_rank=[0, 0], error="a peer left")
        for report in (REPORT, REPORT, failed, REPORT, dataclasses.replace(failed, outcome="skipped")):
            engine.totals = engine.totals.plus(report)
        lines = client.get("/metrics").text.splitlines()
        for line in (
            'equipoise_rebalances_total{outcome="committed"} 3.0',
            'equipoise_rebalances_total{outcome="failed"} 1.0',
            'equipoise_rebalances_total{outcome="skipped"} 1.0',
            'equipoise_rebalances_total{outcome="dry_run"} 0.0',
            "equipoise_moves_total 6.0",
            "equipoise_cross_node_moves_total 3.0",
            "equipoise_moved_bytes_total 90.0",
            "equipoise_stall_seconds_total 0.025",
        ):
            assert line in lines

    def test_every_sum_is_a_counter_named_total(self, client: httpx.Client) -> None:
        client.post("/generate", json={"text": "a", "sampling_params": {"max_new_tokens": 1}})
        families = list(text_string_to_metric_families(client.get("/metrics").text))
        kinds = {family.name: family.type for family in families}
        sums = {name for name, kind in kinds.items() if kind == "counter"}
        assert {f"equipoise_{name}" for name in ("rebalances", "moves", "moved_bytes", "steps", "requests")} <= sums
        for family in families:
            assert family.documentation
            for sample in family.samples:
                counts = sample.name.endswith(("_total", "_count", "_bucket", "_sum"))
                assert counts == (family.type in ("counter", "histogram")), sample

    def test_an_engine_that_dies_while_it_is_asked_fails_no_scrape(
        self, engine: FakeEngine, client: httpx.Client
    ) -> None:
        engine.raises = TransferError("just now")
        assert client.get("/metrics").status_code == 200

    def test_two_servers_in_a_process_do_not_meet(self) -> None:
        for _ in range(2):
            with running_server(create_app(FakeEngine(), CONFIG)) as client:
                client.post("/generate", json={"text": "a", "sampling_params": {"max_new_tokens": 1}})
                assert "equipoise_prompt_tokens_total 1.0" in client.get("/metrics").text
