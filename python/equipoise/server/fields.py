"""Types of request fields: each refuses with one sentence that says what it must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, PlainValidator

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


def only(*neutral: object) -> AfterValidator:
    """A validator for an option that this engine lacks: it takes the values that ask for nothing."""

    def validate(value: Any) -> Any:
        if value is not None and not any(value == one and type(value) in _kin(one) for one in neutral):
            raise ValueError(f"only {' or '.join(map(repr, neutral))} is supported")
        return value

    return AfterValidator(validate)


def _kin(value: object) -> tuple[type, ...]:
    """JSON does not tell 1 from 1.0, but true from 1."""
    return (int, float) if isinstance(value, int | float) and not isinstance(value, bool) else (type(value),)


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
