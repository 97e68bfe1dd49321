"""Who may call what: keys, and pages of other origins."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from equipoise.config import EngineConfig, HttpConfig, ServeConfig
from equipoise.errors import ConfigError
from equipoise.server.app import create_app
from equipoise.server.launch import with_keys
from helpers.fake_engine import FakeEngine
from helpers.http_server import error_of, running_server

USER_CALLS = [
    ("POST", "/generate"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/abort_request"),
    ("GET", "/health_generate"),
    ("GET", "/get_server_info"),
    ("GET", "/v1/models/m"),
    ("GET", "/v1/models"),
    ("GET", "/get_model_info"),
    ("GET", "/server_info"),
    ("GET", "/metrics"),
]
ADMIN_CALLS = [
    ("POST", "/start_expert_distribution_record"),
    ("POST", "/stop_expert_distribution_record"),
    ("POST", "/dump_expert_distribution_record"),
    ("GET", "/status_expert_distribution_record"),
    ("POST", "/eplb/rebalance"),
    ("POST", "/eplb/pause"),
    ("POST", "/eplb/resume"),
    ("GET", "/eplb/status"),
    ("GET", "/eplb/expert_location"),
    ("GET", "/eplb/steps"),
]


def status(client: httpx.Client, call: tuple[str, str], key: str | None) -> int:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    body = {
        "/generate": {"text": "a"},
        "/v1/completions": {"prompt": "a"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
        "/abort_request": {"rid": "a"},
    }.get(call[1])
    return client.request(*call, headers=headers, json=body).status_code


@pytest.mark.parametrize(
    ("api_key", "admin_key", "user_needs", "admin_needs"),
    [
        (None, None, None, None),
        ("user", None, "user", "user"),
        (None, "admin", None, "admin"),
        ("user", "admin", "user", "admin"),
    ],
)
def test_each_call_needs_its_key(
    api_key: str | None, admin_key: str | None, user_needs: str | None, admin_needs: str | None
) -> None:
    config = ServeConfig(EngineConfig("m"), http=HttpConfig(api_key=api_key, admin_api_key=admin_key))
    app = create_app(FakeEngine(), config)
    with running_server(app) as client:
        for calls, needed in ((USER_CALLS, user_needs), (ADMIN_CALLS, admin_needs)):
            for call in calls:
                if needed is None:
                    assert status(client, call, None) == 200, call
                    continue
                assert status(client, call, None) == 401, call
                assert status(client, call, "wrong") == 403, call
                assert status(client, call, needed) == 200, call
                other = "user" if needed == "admin" else "admin"
                assert status(client, call, other) == 403, call
        assert client.get("/health").status_code == 200


def test_every_route_is_listed_above() -> None:
    """A new route has to say here which key it needs."""
    app = create_app(FakeEngine(), ServeConfig(EngineConfig("m")))
    paths = set(app.openapi()["paths"])
    paths = {path.replace("{name}", "m") for path in paths}
    assert paths == {path for _, path in USER_CALLS + ADMIN_CALLS} | {"/health"}


def test_key_is_asked_before_the_body_is_read() -> None:
    config = ServeConfig(EngineConfig("m"), http=HttpConfig(api_key="user"))
    with running_server(create_app(FakeEngine(), config)) as client:
        error_of(client.post("/generate", content=b"{"), 401, "authorization")


def test_key_outside_ascii() -> None:
    config = ServeConfig(EngineConfig("m"), http=HttpConfig(api_key="schlüssel"))
    with running_server(create_app(FakeEngine(), config)) as client:
        right = "Bearer schlüssel".encode()
        assert client.get("/v1/models", headers={b"Authorization": right}).status_code == 200
        assert client.get("/v1/models", headers={b"Authorization": b"Bearer schl\xff"}).status_code == 403


def test_keys_are_never_shown() -> None:
    config = ServeConfig(EngineConfig("m"), http=HttpConfig(api_key="secret-1", admin_api_key="secret-2"))
    with running_server(create_app(FakeEngine(), config)) as client:
        info = client.get("/server_info", headers={"Authorization": "Bearer secret-1"})
        assert info.json()["admin_api_key"] == info.json()["api_key"] == "set"
        assert "secret" not in info.text
        assert info.json()["eplb_rebalance_num_iterations"] == 1000


def test_admin_calls_are_not_taken_from_foreign_pages() -> None:
    engine = FakeEngine()
    with running_server(create_app(engine, ServeConfig(EngineConfig("m")))) as client:
        response = client.post("/eplb/rebalance", headers={"Origin": "http://evil.example"})
        error_of(response, 403, "origin")
        assert engine.commands == []
        own = str(client.base_url).rstrip("/")
        assert client.post("/eplb/rebalance", headers={"Origin": own}).status_code == 200


class TestWhereKeysComeFrom:
    def test_files_and_the_environment_where_no_flag_gives_one(self, tmp_path: Path) -> None:
        file = tmp_path / "key"
        file.write_text("from-file\nnot this\n")
        http = with_keys(HttpConfig(api_key=f"@{file}"), {"EQUIPOISE_ADMIN_API_KEY": "from-env"})
        assert (http.api_key, http.admin_api_key) == ("from-file", "from-env")
        assert with_keys(HttpConfig(api_key="flag"), {"EQUIPOISE_API_KEY": "env"}).api_key == "flag"
        assert with_keys(HttpConfig(), {}).api_key is None

    def test_an_empty_key_is_an_error_and_no_open_door(self, tmp_path: Path) -> None:
        (tmp_path / "empty").write_text("\n")
        with pytest.raises(ConfigError, match="api_key must be a key that is not empty"):
            HttpConfig(api_key="")
        for http, environment in (
            (HttpConfig(), {"EQUIPOISE_API_KEY": " "}),
            (HttpConfig(api_key=f"@{tmp_path / 'empty'}"), {}),
            (HttpConfig(api_key=f"@{tmp_path / 'nowhere'}"), {}),
        ):
            with pytest.raises(ConfigError):
                with_keys(http, environment)
