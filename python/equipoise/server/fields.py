"""Types of request fields: each refuses with one sentence that says what it must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, PlainValidator, WithJsonSchema
from pydantic_core import core_schema

from equipoise.engine.requests import MAX_LOGPROBS

MAX_BATCH = 1024  # prompts in one request
MAX_STOPS = 64
MAX_CHOICES = 128  # answers to one prompt
MAX_RID_CHARACTERS = 256


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


@dataclass(frozen=True)
class _Only:
    """Takes ``neutral`` values and null, in validation and in the schema that clients read."""

    neutral: tuple[object, ...]

    def check(self, value: Any) -> Any:
        if value is not None and not any(value == one and type(value) is type(one) for one in self.neutral):
            raise ValueError(f"only {' or '.join(map(repr, self.neutral))} is supported")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": [*self.neutral, None]}


def only(*neutral: object) -> _Only:
    """A validator for an option that this engine lacks: it takes the values that ask for nothing."""
    return _Only(neutral)


def _number(kind: str, **bounds: object) -> WithJsonSchema:
    """What the schema says of a number; SamplingParams and the routes refuse what is outside, in one sentence."""
    return WithJsonSchema({"type": kind, **bounds})


Count = Annotated[int, _number("integer", minimum=0)]
Choices = Annotated[int, _number("integer", minimum=1, maximum=MAX_CHOICES)]
TopK = Annotated[int, WithJsonSchema({"anyOf": [{"const": -1}, {"type": "integer", "minimum": 1}]})]
Seed = Annotated[int, _number("integer", minimum=0, exclusiveMaximum=2**63)]  # FastAPI writes bounds as floats
NumLogprobs = Annotated[int, _number("integer", minimum=0, maximum=MAX_LOGPROBS)]
Temperature = Annotated[float, _number("number", minimum=0)]
TopP = Annotated[float, _number("number", exclusiveMinimum=0, maximum=1)]
MinP = Annotated[float, _number("number", minimum=0, maximum=1)]
Penalty = Annotated[float, _number("number", minimum=-2, maximum=2)]
RepetitionPenalty = Annotated[float, _number("number", exclusiveMinimum=0, maximum=100)]
LogitBias = Annotated[
    dict[str, float],
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]+$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        }
    ),
]

# What an empty list or text would ask for is nothing: it is refused, and the schema says so.
_SomeText = Annotated[str, Field(min_length=1)]
_TextList = Annotated[list[_SomeText], Field(min_length=1, max_length=MAX_BATCH)]
_IdList = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
_IdLists = Annotated[list[_IdList], Field(min_length=1, max_length=MAX_BATCH)]
_Stops = Annotated[list[_SomeText], Field(max_length=MAX_STOPS)]
_Rid = Annotated[str, Field(min_length=1, max_length=MAX_RID_CHARACTERS)]
_Rids = Annotated[list[_Rid], Field(min_length=1, max_length=MAX_BATCH)]

Text = Annotated[str, PlainValidator(_one_of([_is_text], "a string of valid Unicode"), json_schema_input_type=str)]
_is_texts = _one_of([_is_text, _is_list_of(_is_text)], "a string or a list of strings")
Stops = Annotated[str | list[str], PlainValidator(_is_texts, json_schema_input_type=_SomeText | _Stops)]
Rids = Annotated[str | list[str], PlainValidator(_is_texts, json_schema_input_type=_Rid | _Rids)]
Prompts = Annotated[str | list[str], PlainValidator(_is_texts, json_schema_input_type=_SomeText | _TextList)]
Ids = Annotated[
    list[int] | list[list[int]],
    PlainValidator(
        _one_of([_is_ids, _is_list_of(_is_ids)], "a list of token ids or a list of such lists"),
        json_schema_input_type=_IdList | _IdLists,
    ),
]
TextsOrIds = Annotated[
    str | list[str] | list[int] | list[list[int]],
    PlainValidator(
        _one_of(
            [_is_text, _is_list_of(_is_text), _is_ids, _is_list_of(_is_ids)],
            "a string, a list of strings, a list of token ids or a list of such lists",
        ),
        json_schema_input_type=_SomeText | _TextList | _IdList | _IdLists,
    ),
]
