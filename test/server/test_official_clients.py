"""The clients that people have: OpenAI's own against the demo model, and lm-evaluation-harness's requests.

Skipped where ``openai`` or ``lm_eval`` is not installed: neither belongs to the development extra (lm_eval alone brings
some forty packages); ``pip install openai lm_eval`` adds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from equipoise.config import EngineConfig, ServeConfig
from equipoise.engine import demo_model
from equipoise.engine.engine import Engine
from equipoise.server.app import create_app
from helpers.http_server import running_server


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    engine = Engine.launch(ServeConfig(EngineConfig("demo", ep_size=2, device="cpu", log_level="warning")))
    try:
        with running_server(create_app(engine, ServeConfig(EngineConfig("demo")))) as client:
            yield str(client.base_url).rstrip("/")
    finally:
        engine.close()


def test_openai_client(url: str) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"
    messages: list[Any] = [{"role": "user", "content": "The river"}]
    chat = client.chat.completions.create(
        model="demo", messages=messages, max_tokens=6, temperature=0, n=2, logprobs=True, top_logprobs=2
    )
    assert len(chat.choices) == 2
    assert chat.choices[0].message.content == chat.choices[1].message.content
    assert len(chat.choices[0].logprobs.content) == chat.usage.completion_tokens / 2
    stream = client.chat.completions.create(
        model="demo",
        messages=messages,
        max_tokens=6,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == chat.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 6
    echoed = client.completions.create(model="demo", prompt="The river", max_tokens=0, echo=True, logprobs=1)
    assert echoed.choices[0].text == "The river"
    assert echoed.choices[0].logprobs.token_logprobs[0] is None
    assert len(echoed.choices[0].logprobs.tokens) == echoed.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="demo", prompt="a", temperature=-1)
    assert (caught.value.param, caught.value.body["type"]) == ("temperature", "ConfigError")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_lm_eval_scores_continuations(url: str) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model = LocalCompletionsAPI(
        base_url=f"{url}/v1/completions",
        model="demo",
        tokenizer=str(demo_model.path()),
        tokenizer_backend="huggingface",
        batch_size=2,
        max_length=512,
    )
    pairs = [("The river ran", " down to the sea"), ("The river ran", " zqx!!kk")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    (likely, _), (unlikely, _) = model.loglikelihood(requests)
    assert likely > unlikely
