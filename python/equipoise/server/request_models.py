"""Request bodies. A field that is not listed is refused by name, so that a misspelt option never goes unnoticed.

Options of SGLang and OpenAI that this engine lacks are accepted with the value that asks for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, Discriminator, PlainValidator, Tag

from equipoise.admin.bodies import StrictBody
from equipoise.engine.requests import SamplingParams
from equipoise.errors import ConfigError

MAX_BATCH = 1024  # prompts in one request
MAX_STOPS = 64


def _is_text(value: object) -> bool:
    """A string that UTF-8 can carry: JSON can smuggle in half of a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in value)


def _is_list_of(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _one_of(checks: list[Callable[[object], bool]], must: str) -> Callable[[Any], Any]:
    """A validator that takes a value if any check does. A pydantic union would complain once for each member."""

    def validate(value: Any) -> Any:
        if not any(check(value) for check in checks):
            raise ValueError(f"must be {must}")
        return value

    return validate


def _only(neutral: object) -> AfterValidator:
    def validate(value: Any) -> Any:
        if value is not None and (value != neutral or isinstance(value, bool) != isinstance(neutral, bool)):
            raise ValueError(f"only {neutral!r} is supported")
        return value

    return AfterValidator(validate)


Text = Annotated[str, PlainValidator(_one_of([_is_text], "a string of valid Unicode"), json_schema_input_type=str)]
Texts = Annotated[
    str | list[str],
    PlainValidator(
        _one_of([_is_text, _is_list_of(_is_text)], "a string or a list of strings"),
        json_schema_input_type=str | list[str],
    ),
]
Ids = Annotated[
    list[int] | list[list[int]],
    PlainValidator(
        _one_of([_is_ids, _is_list_of(_is_ids)], "a list of token ids or a list of such lists"),
        json_schema_input_type=list[int] | list[list[int]],
    ),
]
TextsOrIds = Annotated[
    str | list[str] | list[int] | list[list[int]],
    PlainValidator(
        _one_of(
            [_is_text, _is_list_of(_is_text), _is_ids, _is_list_of(_is_ids)],
            "a string, a list of strings, a list of token ids or a list of such lists",
        ),
        json_schema_input_type=str | list[str] | list[int] | list[list[int]],
    ),
]


class SamplingBody(StrictBody):
    """``sampling_params`` of /generate. Defaults are those of the engine's SamplingParams."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: Texts | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    sampling_seed: int | None = None

    n: Annotated[Any, _only(1)] = None
    min_new_tokens: Annotated[Any, _only(0)] = None
    min_p: Annotated[Any, _only(0)] = None
    repetition_penalty: Annotated[Any, _only(1)] = None
    frequency_penalty: Annotated[Any, _only(0)] = None
    presence_penalty: Annotated[Any, _only(0)] = None
    skip_special_tokens: Annotated[Any, _only(True)] = None

    def sampling(self) -> SamplingParams:
        """
        Raises:
            ConfigError: a value out of range; ``field`` is its path in the request.
        """
        try:
            return _sampling_of(self, max_new_tokens=self.max_new_tokens, seed=self.sampling_seed)
        except ConfigError as error:
            name = "sampling_seed" if error.field == "seed" else error.field
            raise _renamed(error, f"sampling_params.{name}") from None


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


class GenerateBody(StrictBody):
    """POST /generate, in SGLang's shape: exactly one of ``text`` and ``input_ids``; lists make a batch."""

    text: Texts | None = None
    input_ids: Ids | None = None
    sampling_params: Sampling | None = None
    stream: bool = False
    rid: Texts | None = None

    return_logprob: Annotated[Any, _only(False)] = None


class StreamOptions(StrictBody):
    include_usage: bool = False


class CompletionBody(StrictBody):
    """POST /v1/completions, in OpenAI's shape, with ``top_k``, ``stop_token_ids`` and ``ignore_eos`` on top."""

    model: Text | None = None
    prompt: TextsOrIds
    max_tokens: int | None = 16
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: Texts | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Text | None = None

    n: Annotated[Any, _only(1)] = None
    best_of: Annotated[Any, _only(1)] = None
    echo: Annotated[Any, _only(False)] = None
    logprobs: Annotated[Any, _only(None)] = None
    logit_bias: Annotated[Any, _only(None)] = None
    suffix: Annotated[Any, _only(None)] = None
    frequency_penalty: Annotated[Any, _only(0)] = None
    presence_penalty: Annotated[Any, _only(0)] = None

    def sampling(self) -> SamplingParams:
        """
        Raises:
            ConfigError: a value out of range; ``field`` is its name in the request.
        """
        try:
            return _sampling_of(self, max_new_tokens=self.max_tokens, seed=self.seed)
        except ConfigError as error:
            raise _renamed(error, "max_tokens" if error.field == "max_new_tokens" else error.field) from None


def _renamed(error: ConfigError, field: str | None) -> ConfigError:
    """The engine's complaint about a value, under the name that the client gave it."""
    return ConfigError(f"{field}{str(error).removeprefix(error.field or '')}", field=field)


def _sampling_of(body: SamplingBody | CompletionBody, *, max_new_tokens: Any, seed: Any) -> SamplingParams:
    """What both request shapes say alike, with what they call by different names."""
    return make_sampling(
        max_new_tokens=max_new_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=body.stop,
        stop_token_ids=body.stop_token_ids,
        ignore_eos=body.ignore_eos,
        seed=seed,
    )


def make_sampling(**given: Any) -> SamplingParams:
    """SamplingParams from what a client gave; None and missing mean the engine's default."""
    stops = given.pop("stop")
    if stops is not None:
        stops = (stops,) if isinstance(stops, str) else tuple(stops)
        if len(stops) > MAX_STOPS or "" in stops:
            raise ConfigError(f"stop must be at most {MAX_STOPS} strings, none of them empty", field="stop")
        given["stop"] = stops
    if given["stop_token_ids"] is not None:
        given["stop_token_ids"] = tuple(given["stop_token_ids"])
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})
