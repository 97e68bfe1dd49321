"""Body of POST /generate, in SGLang's shape. A field that is not listed is refused by name.

Options of SGLang that this engine lacks are accepted with the value that asks for nothing.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Discriminator, Tag, WithJsonSchema

from equipoise.admin.bodies import StrictBody
from equipoise.engine.requests import SamplingParams
from equipoise.errors import ConfigError
from equipoise.server.fields import (
    MAX_STOPS,
    Choices,
    Count,
    Ids,
    LogitBias,
    MinP,
    NumLogprobs,
    Penalty,
    Prompts,
    RepetitionPenalty,
    Rids,
    Seed,
    Stops,
    Temperature,
    TopK,
    TopP,
    only,
)


class SamplingFields(StrictBody):
    """What every call names as the engine's SamplingParams do; null is the default there."""

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    repetition_penalty: RepetitionPenalty | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    stop: Stops | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None


class SamplingBody(SamplingFields):
    """``sampling_params`` of /generate."""

    max_new_tokens: Count | None = None
    sampling_seed: Seed | None = None
    n: Choices | None = None

    min_new_tokens: Annotated[Any, only(0)] = None
    skip_special_tokens: Annotated[Any, only(True)] = None

    def sampling(self, **more: Any) -> SamplingParams:
        """
        Raises:
            ConfigError: a value out of range; ``field`` is its path in the request.
        """
        try:
            return sampling_of(self, max_new_tokens=self.max_new_tokens, seed=self.sampling_seed, **more)
        except ConfigError as error:
            name = "sampling_seed" if error.field == "seed" else error.field
            raise renamed(error, f"sampling_params.{name}") from None


def _sampling_shape(value: object) -> str | None:
    return "(one)" if isinstance(value, dict | SamplingBody) else "(batch)" if isinstance(value, list) else None


# Tagged, because an untagged union complains once for each shape. The tags are admin.http_errors.UNION_TAGS.
Sampling = Annotated[
    Annotated[SamplingBody, Tag("(one)")] | Annotated[list[SamplingBody], Tag("(batch)")],
    Discriminator(
        _sampling_shape,
        custom_error_type="sampling_shape",
        custom_error_message="must be an object or a list of objects",
    ),
]


_LogprobStart = Annotated[int, WithJsonSchema({"enum": [-1, 0]})]


def _either(one: str, other: str) -> dict[str, Any]:
    """Schema of a body that has ``one``, and ``other`` not at all or null."""
    null = {"type": "null"}
    return {"required": [one], "properties": {one: {"not": null}, other: null}}


class GenerateBody(StrictBody):
    """POST /generate, in SGLang's shape: exactly one of ``text`` and ``input_ids``; lists make a batch."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [_either("text", "input_ids"), _either("input_ids", "text")]})

    text: Prompts | None = None
    input_ids: Ids | None = None
    sampling_params: Sampling | None = None
    stream: bool | None = None
    rid: Rids | None = None
    return_logprob: bool | None = None
    logprob_start_len: _LogprobStart | None = None
    top_logprobs_num: NumLogprobs | None = None


def renamed(error: ConfigError, field: str | None) -> ConfigError:
    """The engine's complaint about a value, under the name that the client gave it."""
    return ConfigError(f"{field}{str(error).removeprefix(error.field or '')}", field=field)


def sampling_of(body: SamplingFields, **given: Any) -> SamplingParams:
    """Make SamplingParams of a body; what is None or missing is the engine's default.

    Raises:
        ConfigError: a value out of range, by the engine's name of it.
    """
    for name in SamplingFields.model_fields:
        given[name] = getattr(body, name)
    stops = given["stop"]
    if stops is not None:
        stops = (stops,) if isinstance(stops, str) else tuple(stops)
        if len(stops) > MAX_STOPS or "" in stops:
            raise ConfigError(f"stop must be at most {MAX_STOPS} strings, none of them empty", field="stop")
        given["stop"] = stops
    if given["stop_token_ids"] is not None:
        given["stop_token_ids"] = tuple(given["stop_token_ids"])
    if body.logit_bias is not None:
        if not all(token.isdecimal() and token.isascii() for token in body.logit_bias):
            raise ConfigError("logit_bias must have token ids for keys", field="logit_bias")
        given["logit_bias"] = tuple((int(token), bias) for token, bias in body.logit_bias.items())
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})
