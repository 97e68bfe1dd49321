"""/openapi.json says what is sent: the shape of errors, the keys that are asked for, streams, metrics as text."""

from __future__ import annotations

from typing import Any

import pytest

from equipoise.admin.http_errors import ErrorAnswer
from equipoise.config import EngineConfig, HttpConfig, ServeConfig
from equipoise.server.app import create_app
from helpers.fake_engine import FakeEngine
from helpers.http_server import running_server

IDS = {"type": "integer", "minimum": 0, "maximum": 255}  # the largest of FakeEngine's vocabulary
STREAMING = {"/generate", "/v1/completions", "/v1/chat/completions"}


def document(**http: Any) -> dict[str, Any]:
    return create_app(FakeEngine(), ServeConfig(EngineConfig("m"), http=HttpConfig(**http))).openapi()


def operations(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {path: operation for path, by_method in schema["paths"].items() for operation in by_method.values()}


def test_every_route_documents_its_errors() -> None:
    schema = document()
    for path, operation in operations(schema).items():
        responses = operation["responses"]
        assert set(responses) == {"200", "4XX", "5XX"}, path
        for status in ("4XX", "5XX"):
            assert responses[status]["content"] == {
                "application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}
            }, path
    detail = schema["components"]["schemas"]["ErrorDetail"]
    assert set(detail["required"]) == {"message", "type", "field", "param", "code"}
    assert "HTTPValidationError" not in schema["components"]["schemas"], "FastAPI's own, which no route sends"


@pytest.mark.parametrize(
    ("http", "user", "admin"),
    [
        ({}, [], []),
        ({"api_key": "u"}, [{"ApiKey": []}], [{"ApiKey": []}]),
        ({"admin_api_key": "a"}, [], [{"AdminKey": []}]),
        ({"api_key": "u", "admin_api_key": "a"}, [{"ApiKey": []}], [{"AdminKey": []}]),
    ],
)
def test_keys_are_documented_where_they_are_asked_for(http: dict[str, str], user: list[Any], admin: list[Any]) -> None:
    schema = document(**http)
    schemes = schema["components"].get("securitySchemes", {})
    assert set(schemes) == {name for need in (*user, *admin) for name in need}
    assert all((scheme["type"], scheme["scheme"]) == ("http", "bearer") for scheme in schemes.values())
    for path, operation in operations(schema).items():
        is_admin = path.startswith("/eplb/") or path.endswith("_expert_distribution_record")
        expected = [] if path == "/health" else admin if is_admin else user
        assert operation.get("security", []) == expected, path


def test_metrics_are_text_and_generation_may_stream() -> None:
    for path, operation in operations(document()).items():
        expected = {"text/plain"} if path == "/metrics" else {"application/json"}
        expected |= {"text/event-stream"} if path in STREAMING else set()
        assert set(operation["responses"]["200"]["content"]) == expected, path


def test_what_is_sent_is_what_is_documented() -> None:
    config = ServeConfig(EngineConfig("m"), http=HttpConfig(api_key="u"))
    engine = FakeEngine()
    with running_server(create_app(engine, config)) as client:
        refusals = [client.get("/v1/models")]
        client.headers["Authorization"] = "Bearer u"
        refusals += [client.get("/nowhere"), client.post("/health"), client.get("/eplb/steps?since=x")]
        refusals += [client.post("/generate", json={"text": 1}), client.get("/v1/models/other")]
        engine.error = "rank 1 was killed"
        refusals += [client.get("/health"), client.get("/eplb/status")]
        for response, status in zip(refusals, (401, 404, 405, 400, 400, 404, 503, 503), strict=True):
            assert response.status_code == status, response.request.url
            assert ErrorAnswer.model_validate(response.json(), extra="forbid").error.code == status
        assert client.get("/metrics").headers["content-type"].startswith("text/plain")
        assert client.get("/openapi.json").json()["info"]["title"] == "Equipoise"


@pytest.mark.parametrize(
    ("body", "field", "bound"),
    [
        ("CompletionBody", "suffix", {"enum": ["", None]}),
        ("GenerateBody", "text", {"type": "string", "minLength": 1}),
        ("GenerateBody", "input_ids", {"items": IDS, "minItems": 1, "type": "array"}),
        ("GenerateBody", "logprob_start_len", {"enum": [-1, 0]}),
        ("CompletionBody", "top_k", {"const": -1}),
        ("ChatBody", "messages", {"minItems": 1}),
        ("RebalanceBody", "max_moves_per_layer", {"minimum": 0, "type": "integer"}),
        ("RebalanceBody", "move_price", {"minimum": 0, "type": "number"}),
    ],
)
def test_the_schema_says_what_is_refused(body: str, field: str, bound: dict[str, Any]) -> None:
    rule = document()["components"]["schemas"][body]["properties"][field]
    assert bound.items() <= rule.items() or bound in rule["anyOf"]


def numbers_of(schema: dict[str, Any], body: str) -> dict[str, dict[str, Any]]:
    """Fields of a body that are numbers, each with its bounds."""
    fields = schema["components"]["schemas"][body]["properties"]
    rules = {name: [rule, *rule.get("anyOf", ())] for name, rule in fields.items()}
    number = ("integer", "number")
    return {name: rule for name, some in rules.items() for rule in some if rule.get("type") in number}


BODIES = {
    "SamplingBody": ("/generate", {"text": "a"}, "sampling_params"),
    "GenerateBody": (
        "/generate",
        {"text": "a", "return_logprob": True, "sampling_params": {"max_new_tokens": 1}},
        None,
    ),
    "CompletionBody": ("/v1/completions", {"prompt": "a"}, None),
    "ChatBody": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "logprobs": True}, None),
}


@pytest.mark.parametrize("body", BODIES)
def test_numbers_are_taken_at_the_bounds_that_are_documented_and_refused_beyond(body: str) -> None:
    path, valid, inner = BODIES[body]
    numbers = numbers_of(document(), body)
    assert len(numbers) >= (1 if body == "GenerateBody" else 10), sorted(numbers)
    with running_server(create_app(FakeEngine(), ServeConfig(EngineConfig("m")))) as client:
        for name, rule in numbers.items():
            step = 1 if rule["type"] == "integer" else 0.001
            tries = [(rule[key], 200) for key in ("minimum", "maximum") if key in rule]
            tries += [(rule[key] + sign * step, 400) for key, sign in (("minimum", -1), ("maximum", 1)) if key in rule]
            for key, sign in (("exclusiveMinimum", 1), ("exclusiveMaximum", -1)):
                bound = int(rule[key]) if rule["type"] == "integer" and key in rule else rule.get(key)
                tries += [] if bound is None else [(bound, 400), (bound + sign * step, 200)]
            assert tries, f"{name} has no bounds"
            for number, status in tries:
                value = int(number) if rule["type"] == "integer" else number
                more = {name: value} if inner is None else {inner: {"max_new_tokens": 1, name: value}}
                answer = client.post(path, json={**valid, **more})
                assert answer.status_code == status, (name, value, answer.text)


def test_one_entry_is_taken_for_one_prompt() -> None:
    with running_server(create_app(FakeEngine(), ServeConfig(EngineConfig("m")))) as client:
        body = {"text": "a", "sampling_params": [{"max_new_tokens": 1}], "rid": ["r"]}
        answer = client.post("/generate", json=body)
        assert (answer.status_code, answer.json()["meta_info"]["id"]) == (200, "r")
        body["sampling_params"] = [{}, {}]
        assert client.post("/generate", json=body).json()["error"]["field"] == "sampling_params"


def test_whole_numbers_are_integers_however_they_are_written() -> None:
    with running_server(create_app(FakeEngine(), ServeConfig(EngineConfig("m")))) as client:
        for path, whole, half in (
            ("/generate", '{"input_ids": [65.0, 66], "sampling_params": {"max_new_tokens": 2.0}}', "66.5"),
            ("/v1/completions", '{"prompt": [[65.0, 66]], "max_tokens": 2.0, "stop_token_ids": [7.0]}', "66.5"),
        ):
            headers = {"content-type": "application/json"}
            assert client.post(path, content=whole, headers=headers).status_code == 200
            assert client.post(path, content=whole.replace("66", half), headers=headers).status_code == 400
