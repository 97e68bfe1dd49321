"""Bodies of /v1/completions and /v1/chat/completions, in OpenAI's shape with SGLang's additions.

Options that this engine lacks are accepted with the value that asks for nothing.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field, WithJsonSchema

from equipoise.admin.bodies import StrictBody
from equipoise.engine.requests import SamplingParams
from equipoise.errors import ConfigError
from equipoise.server.fields import (
    Choices,
    Count,
    NumLogprobs,
    Seed,
    Text,
    TextsOrIds,
    only,
)
from equipoise.server.request_models import SamplingFields, renamed, sampling_of


class StreamOptions(StrictBody):
    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, only(False)] = None


class OpenAiBody(SamplingFields):
    """What both calls share."""

    model: Text | None = None
    seed: Seed | None = None
    n: Choices | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Text | None = None
    metadata: dict[str, str] | None = None
    store: Annotated[Any, only(False)] = None
    service_tier: Annotated[Any, only("auto", "default")] = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk that tells the tokens used."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def _sampling(self, max_tokens: int | None, max_name: str, **more: Any) -> SamplingParams:
        try:
            return sampling_of(self, max_new_tokens=max_tokens, seed=self.seed, **more)
        except ConfigError as error:
            raise renamed(error, max_name if error.field == "max_new_tokens" else error.field) from None


class CompletionBody(OpenAiBody):
    """POST /v1/completions."""

    prompt: TextsOrIds
    max_tokens: Count | None = 16
    logprobs: NumLogprobs | None = None
    echo: bool | None = None
    best_of: Annotated[Any, only(1)] = None
    suffix: Annotated[Any, only("")] = None

    def sampling(self) -> SamplingParams:
        """
        Raises:
            ConfigError: a value out of range; ``field`` is its name in the request.
        """
        scored = bool(self.echo) and self.logprobs is not None
        return self._sampling(self.max_tokens, "max_tokens", logprobs=self.logprobs, prompt_logprobs=scored)


_Part = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "type": "object",
            "required": ["type", "text"],
            "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        }
    ),
]


class ChatMessage(StrictBody):
    """One message. ``content``: a string, or parts of type ``text``."""

    model_config = ConfigDict(extra="allow")  # templates read fields of their own: name, tool_calls, ...

    role: Text
    content: Text | list[_Part] | None = None

    def for_template(self, field: str) -> dict[str, Any]:
        """The message as chat templates take it.

        Raises:
            ConfigError: a part that is no text.
        """
        message = self.model_dump()
        if isinstance(self.content, list):
            if not all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in self.content):
                raise ConfigError(f"{field}.content must hold parts of type text only", field=f"{field}.content")
            message["content"] = "".join(part["text"] for part in self.content)
        return message


class ChatBody(OpenAiBody):
    """POST /v1/chat/completions."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"properties": {"logprobs": {"const": True}}, "required": ["logprobs"]},
                {"properties": {"top_logprobs": {"enum": [0, None]}}},
            ]
        }
    )

    messages: Annotated[list[ChatMessage], Field(json_schema_extra={"minItems": 1})]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    response_format: Annotated[Any, only({"type": "text"})] = None
    tools: Annotated[Any, only([])] = None
    tool_choice: Annotated[Any, only("none")] = None
    parallel_tool_calls: Annotated[Any, only(True, False)] = None

    def sampling(self) -> SamplingParams:
        """
        Raises:
            ConfigError: a value out of range; ``field`` is its name in the request.
        """
        if self.top_logprobs and not self.logprobs:
            raise ConfigError("top_logprobs needs logprobs: true", field="top_logprobs")
        completion = self.max_completion_tokens
        tokens, name = (self.max_tokens, "max_tokens") if completion is None else (completion, "max_completion_tokens")
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._sampling(tokens, name, logprobs=logprobs)
