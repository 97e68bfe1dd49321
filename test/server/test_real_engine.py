"""HTTP against the real engine: answers, streams, a rebalance while it answers, recordings, and bad requests."""

from __future__ import annotations

import json
import threading
import time
from itertools import pairwise
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from equipoise.load.trace import LoadTrace
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.topology import EpTopology
from helpers.bad_requests import BAD_BODIES
from helpers.http_server import error_of, sse_events
from helpers.request_strategies import any_request, check_no_request_is_our_fault
from server.conftest import RealServer

GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
PROMPTS = ["The moon", "def f(x):", "zwölf Boxkämpfer", "1 2 3 4 5 6"]


@pytest.fixture
def client(real_server: RealServer) -> httpx.Client:
    return real_server.client


@pytest.fixture(scope="module")
def expected(real_server: RealServer) -> dict[str, list[int]]:
    """Greedy tokens of the same model in plain transformers, without expert parallelism."""
    model = AutoModelForCausalLM.from_pretrained(real_server.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(real_server.model)
    answers = {}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        for _ in range(GREEDY["max_new_tokens"]):
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, -1]
            ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
        answers[prompt] = ids[0, -GREEDY["max_new_tokens"] :].tolist()
    return answers


def generate(client: httpx.Client, **body: Any) -> Any:
    response = client.post("/generate", json=body)
    assert response.status_code == 200, response.text
    return response.json()


class TestGenerate:
    def test_batch_equals_plain_transformers(self, client: httpx.Client, expected: dict[str, list[int]]) -> None:
        answers = generate(client, text=PROMPTS, sampling_params=GREEDY)
        assert {prompt: answer["output_ids"] for prompt, answer in zip(PROMPTS, answers, strict=True)} == expected

    def test_meta_info(self, client: httpx.Client) -> None:
        answer = generate(client, text="The moon", rid="mine", sampling_params=GREEDY)
        meta = answer["meta_info"]
        assert meta["id"] == "mine"
        assert meta["finish_reason"] == {"type": "length", "length": 12}
        assert (meta["prompt_tokens"], meta["completion_tokens"]) == (8, 12)
        assert 0 < meta["e2e_latency"] < 60

    def test_input_ids_equal_text(self, real_server: RealServer, expected: dict[str, list[int]]) -> None:
        ids = real_server.engine.tokenizer(PROMPTS[0])["input_ids"]
        answer = generate(real_server.client, input_ids=ids, sampling_params=GREEDY)
        assert answer["output_ids"] == expected[PROMPTS[0]]

    def test_stream_grows_to_the_whole_answer(self, client: httpx.Client, expected: dict[str, list[int]]) -> None:
        whole = generate(client, text=PROMPTS[2], sampling_params=GREEDY)
        events = sse_events(client, "/generate", {"text": PROMPTS[2], "stream": True, "sampling_params": GREEDY})
        for before, after in pairwise(events):
            assert after["text"].startswith(before["text"])
            assert before["meta_info"]["finish_reason"] is None
        assert events[-1]["output_ids"] == expected[PROMPTS[2]]
        assert events[-1]["text"] == whole["text"]
        assert events[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 12}

    def test_stop_token_is_named(self, client: httpx.Client, expected: dict[str, list[int]]) -> None:
        third = expected[PROMPTS[1]][2]
        params = {**GREEDY, "stop_token_ids": [third]}
        answer = generate(client, text=PROMPTS[1], sampling_params=params)
        cut = expected[PROMPTS[1]].index(third) + 1
        assert answer["output_ids"] == expected[PROMPTS[1]][:cut]
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": third}

    def test_seed_makes_sampling_repeat(self, client: httpx.Client) -> None:
        params = {"max_new_tokens": 16, "temperature": 1.0, "sampling_seed": 7, "ignore_eos": True}
        first, second = (generate(client, text="a", sampling_params=params) for _ in range(2))
        assert first["output_ids"] == second["output_ids"]
        other = generate(client, text="a", sampling_params={**params, "sampling_seed": 8})
        assert other["output_ids"] != first["output_ids"]

    def test_too_long_and_outside_the_vocabulary(self, client: httpx.Client) -> None:
        assert "256" in error_of(client.post("/generate", json={"text": "a" * 300}), 400, "text")
        error_of(client.post("/generate", json={"input_ids": [1] * 300}), 400, "input_ids")
        assert "99999" in error_of(client.post("/generate", json={"input_ids": [99999]}), 400, "input_ids")
        body = {"input_ids": [-1], "stream": True}
        assert "-1" in error_of(client.post("/generate", json=body), 400, "input_ids")

    def test_client_that_leaves_frees_its_row(self, client: httpx.Client) -> None:
        body = {"text": "a", "stream": True, "sampling_params": {"max_new_tokens": 250, "ignore_eos": True}}
        with client.stream("POST", "/generate", json=body) as response:
            next(response.iter_lines())
        deadline = time.monotonic() + 20
        while "equipoise_running_requests 0.0" not in client.get("/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.05)


class TestCompletions:
    def test_whole(self, client: httpx.Client, expected: dict[str, list[int]], real_server: RealServer) -> None:
        body = {"model": "tiny", "prompt": PROMPTS[:2], "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        answer = client.post("/v1/completions", json=body).json()
        assert answer["object"] == "text_completion"
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]
        decode = real_server.engine.tokenizer.decode
        for choice, prompt in zip(answer["choices"], PROMPTS, strict=False):
            assert choice["text"] == decode(expected[prompt], skip_special_tokens=True)
            assert choice["finish_reason"] == "length"
        prompt_tokens = sum(len(prompt.encode()) for prompt in PROMPTS[:2])
        assert answer["usage"] == {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": 24,
            "total_tokens": prompt_tokens + 24,
        }

    def test_stream_adds_up(self, client: httpx.Client) -> None:
        body = {"prompt": PROMPTS[3], "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        whole = client.post("/v1/completions", json=body).json()
        events = sse_events(
            client, "/v1/completions", {**body, "stream": True, "stream_options": {"include_usage": True}}
        )
        assert "".join(event["choices"][0]["text"] for event in events[:-1]) == whole["choices"][0]["text"]
        assert events[-1]["choices"] == []
        assert events[-1]["usage"] == whole["usage"]
        assert len({event["id"] for event in events}) == 1


class TestBalancing:
    def test_rebalance_while_it_answers_changes_no_answer(
        self, client: httpx.Client, expected: dict[str, list[int]]
    ) -> None:
        for _ in range(3):
            generate(client, text=PROMPTS, sampling_params=GREEDY)
        streamed: list[list[dict[str, Any]]] = []
        errors: list[BaseException] = []

        def stream() -> None:
            try:
                with httpx.Client(base_url=client.base_url, timeout=60) as own:
                    for _ in range(4):
                        body = {"text": PROMPTS[0], "stream": True, "sampling_params": GREEDY}
                        streamed.append(sse_events(own, "/generate", body))
            except BaseException as error:
                errors.append(error)

        before = client.get("/eplb/expert_location").json()
        thread = threading.Thread(target=stream)
        thread.start()
        response = client.post("/eplb/rebalance", json={"algorithm": "deepseek"})
        thread.join(60)
        assert not errors
        assert response.status_code == 200, response.text
        report = response.json()
        after = client.get("/eplb/expert_location").json()

        assert report["outcome"] == "committed"
        assert report["algorithm"] == "deepseek"
        assert report["bytes_moved"] == sum(report["bytes_received_per_rank"]) > 0
        assert report["mean_balancedness_after"] >= report["mean_balancedness_before"]
        topology = EpTopology(2, 2, 6)
        old, new = (
            ExpertLocationMetadata.from_physical_to_logical(reply["physical_to_logical_map"], 8, topology)
            for reply in (before, after)
        )
        assert report["slots_changed"] == old.diff(new).slots_changed.tolist()
        assert report["moves"] == old.diff(new).moves.tolist()
        assert sum(report["moves"]) > 0
        assert [events[-1]["output_ids"] for events in streamed] == [expected[PROMPTS[0]]] * 4
        answers = generate(client, text=PROMPTS, sampling_params=GREEDY)
        assert [answer["output_ids"] for answer in answers] == list(expected.values())

    def test_dry_run_changes_nothing(self, client: httpx.Client) -> None:
        generate(client, text=PROMPTS, sampling_params=GREEDY)
        before = client.get("/eplb/expert_location").json()
        report = client.post("/eplb/rebalance", json={"dry_run": True}).json()
        assert report["outcome"] in ("dry_run", "skipped")
        assert client.get("/eplb/expert_location").json() == before

    def test_unknown_algorithm_lists_the_known(self, client: httpx.Client) -> None:
        response = client.post("/eplb/rebalance", json={"algorithm": "best"})
        assert "deepseek_hierarchical" in error_of(response, 400, "algorithm")

    def test_status(self, client: httpx.Client) -> None:
        generate(client, text="a", sampling_params=GREEDY)
        status = client.get("/eplb/status").json()
        assert status["phase"] == "collecting"
        assert (status["num_ranks"], status["num_nodes"]) == (2, 2)
        assert (status["num_logical_experts"], status["num_physical_experts"]) == (8, 12)
        assert "deepseek" in status["available_algorithms"]
        assert status["forward_pass_id"] > 0

    def test_steps_since(self, client: httpx.Client) -> None:
        generate(client, text="a", sampling_params=GREEDY)
        steps = client.get("/eplb/steps").json()
        ids = [step["forward_pass_id"] for step in steps]
        assert ids == sorted(set(ids))
        assert all(step["seconds"] > 0 and step["num_tokens"] > 0 for step in steps)
        rest = client.get("/eplb/steps", params={"since": ids[-2]}).json()
        assert rest == steps[-2:]

    def test_metrics_show_it(self, client: httpx.Client) -> None:
        generate(client, text="a", sampling_params=GREEDY)
        text = client.get("/metrics").text
        for name in ("equipoise_balancedness_mean", "equipoise_step_seconds_count", "equipoise_generated_tokens_total"):
            (line, *_) = [line for line in text.splitlines() if line.startswith(name)]
            assert float(line.split()[-1]) > 0, line


class TestRecording:
    def test_record_stop_dump(self, client: httpx.Client, real_server: RealServer) -> None:
        assert client.post("/start_expert_distribution_record").status_code == 200
        generate(client, text=PROMPTS[0], sampling_params=GREEDY)
        assert client.post("/stop_expert_distribution_record").status_code == 200
        generate(client, text=PROMPTS[1], sampling_params=GREEDY)  # not in the dump
        reply = client.post("/dump_expert_distribution_record").json()
        assert reply["path"].startswith(str(real_server.dumps))
        trace = LoadTrace.open(reply["path"])
        assert trace.num_steps == reply["num_steps"] == 12
        # 8 prompt tokens, then one a step: every token goes to 2 experts in every layer.
        assert trace.logical_count.sum(axis=(0, 2)).tolist() == [2 * (8 + 11)] * trace.num_layers

    def test_a_streamed_recording_is_a_trace_of_every_step(
        self, client: httpx.Client, real_server: RealServer, expected: dict[str, list[int]]
    ) -> None:
        begun = client.post("/start_expert_distribution_record", json={"stream": "per_pass"}).json()["stream"]
        assert begun["path"].startswith(str(real_server.dumps))
        answer = generate(client, text=PROMPTS[0], sampling_params=GREEDY)
        assert client.get("/eplb/status").json()["recording"]
        running = client.get("/status_expert_distribution_record").json()
        assert (running["recording"], running["stream"]["ranks"][1]["num_steps"]) == (True, 12)
        stopped = client.post("/stop_expert_distribution_record").json()["stream"]
        generate(client, text=PROMPTS[1], sampling_params=GREEDY)  # not in the trace
        assert stopped["finished"]
        assert [(rank["num_written"], rank["num_dropped"]) for rank in stopped["ranks"]] == [(12, 0)] * 2
        assert answer["output_ids"] == expected[PROMPTS[0]]
        trace = LoadTrace.open(stopped["path"])
        assert trace.logical_count.sum(axis=2).tolist() == [[16] * trace.num_layers] + [[2] * trace.num_layers] * 11
        assert trace.rank_count is not None
        assert trace.rank_count.sum(axis=(2, 3)).tolist()[0] == [8 * trace.num_layers] * 2, "half of a prompt each"
        assert trace.phases is not None
        assert trace.phases.tolist() == [1] + [2] * 11
        assert trace.timestamps is not None
        assert 0 < trace.timestamps[-1] - trace.timestamps[0] < 60
        assert trace.metadata["num_nodes"] == 2
        assert not trace.notes
        assert "streamed" in error_of(client.post("/dump_expert_distribution_record"), 409)

    def test_streamed_tokens_add_up_to_streamed_counts(self, client: httpx.Client) -> None:
        traces = {}
        for mode in ("per_pass", "per_token"):
            assert client.post("/start_expert_distribution_record", json={"stream": mode}).status_code == 200
            generate(client, text=PROMPTS[2], sampling_params=GREEDY)
            traces[mode] = LoadTrace.open(client.post("/stop_expert_distribution_record").json()["stream"]["path"])
        counts, tokens = traces["per_pass"], traces["per_token"]
        assert counts.logical_count.tolist() == tokens.logical_count.tolist()
        assert counts.rank_count is not None
        assert tokens.rank_count is not None
        assert counts.rank_count.tolist() == tokens.rank_count.tolist()
        assert tokens.topk_ids is not None
        assert tokens.token_offsets is not None
        sizes = np.diff(tokens.token_offsets).tolist()
        assert sizes == [len(PROMPTS[2].encode())] + [1] * 11
        assert tokens.topk_ids.shape == (sum(sizes), tokens.num_layers, 2)
        assert (tokens.topk_ids >= 0).all()
        assert not tokens.notes

    def test_what_cannot_be_streamed_is_refused_by_field(self, client: httpx.Client) -> None:
        error_of(client.post("/start_expert_distribution_record", json={"stream": "per_layer"}), 400, "stream")
        error_of(client.post("/start_expert_distribution_record", json={"strem": "per_pass"}), 400, "strem")

    def test_stop_without_start_is_a_409(self, client: httpx.Client) -> None:
        client.post("/start_expert_distribution_record")
        client.post("/stop_expert_distribution_record")
        error_of(client.post("/stop_expert_distribution_record"), 409)
        assert client.get("/health").status_code == 200


class TestBadRequests:
    @pytest.mark.parametrize(("path", "body", "field"), BAD_BODIES[::5])
    def test_refused_by_field(self, client: httpx.Client, path: str, body: Any, field: str) -> None:
        headers = {"Content-Type": "application/json"}
        error_of(client.post(path, content=json.dumps(body), headers=headers), 400, field)

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(request=any_request)
    def test_no_request_is_our_fault(self, client: httpx.Client, request: tuple[str, Any]) -> None:
        check_no_request_is_our_fault(client, *request)

    def test_engine_lives_after_all_that(self, client: httpx.Client, expected: dict[str, list[int]]) -> None:
        assert client.get("/health").status_code == 200
        assert generate(client, text=PROMPTS[0], sampling_params=GREEDY)["output_ids"] == expected[PROMPTS[0]]
