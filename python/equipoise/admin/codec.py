"""Commands and replies as JSON, by name and a closed table: between an HTTP process and the ranks, and to a client.

A command is ``{"command": "Rebalance", "dry_run": true}``, a reply its fields, an error
``{"error": {"type": "PhaseError", "message": "...", "field": null}}``. Nothing is unpickled, no name is looked up
outside of the tables.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any, TypeVar, cast, get_args

from pydantic import TypeAdapter, ValidationError

from equipoise import errors
from equipoise.errors import ConfigError, EquipoiseError, InvalidInputError
from equipoise.manager.commands import (
    Command,
    DumpRecording,
    GetExpertLocation,
    GetRecording,
    GetStatus,
    Pause,
    Rebalance,
    Resume,
    StartRecording,
    StopRecording,
)
from equipoise.manager.reports import RebalanceReport

R = TypeVar("R")

COMMANDS: dict[str, type[Command[Any]]] = {
    kind.__name__: kind
    for kind in (
        DumpRecording,
        GetExpertLocation,
        GetRecording,
        GetStatus,
        Pause,
        Rebalance,
        Resume,
        StartRecording,
        StopRecording,
    )
}
"""What :func:`decode_command` knows."""


def _subclasses(kind: type[EquipoiseError]) -> Iterator[type[EquipoiseError]]:
    yield kind
    for derived in kind.__subclasses__():
        yield from _subclasses(derived)


_ERRORS: dict[str, type[EquipoiseError]] = {
    kind.__name__: kind for kind in _subclasses(EquipoiseError) if kind.__module__ == errors.__name__
}


def jsonable(value: Any) -> Any:
    """``value`` with dataclasses as objects and numbers that JSON has no word for (NaN, infinity) as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(value, RebalanceReport):
            fields["bytes_moved"] = value.bytes_moved
        return fields
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def encode_command(command: Command[Any]) -> str:
    """The command as JSON; its type must be one of :data:`COMMANDS`."""
    assert COMMANDS.get(type(command).__name__) is type(command)
    return json.dumps({"command": type(command).__name__, **jsonable(command)})


def decode_command(text: str) -> Command[Any]:
    """
    Raises:
        ConfigError: not JSON, an unknown command or field, a value of the wrong type.
    """
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"the command is not JSON: {error}", field="command") from None
    name = fields.pop("command", None) if isinstance(fields, dict) else None
    if name not in COMMANDS:
        raise ConfigError(f"command must be one of {', '.join(COMMANDS)}, got {name!r}", field="command")
    kind = COMMANDS[name]
    for field in fields:
        if field not in {known.name for known in dataclasses.fields(cast(Any, kind))}:
            raise ConfigError(f"{name} has no field {field!r}", field=field)
    try:
        return TypeAdapter(kind).validate_json(json.dumps(fields), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else "command"
        raise ConfigError(f"{name}.{field}: {first['msg']}, got {first.get('input')!r}", field=field) from None


def encode_reply(reply: object) -> str:
    """A reply, or the EquipoiseError that takes its place, as JSON."""
    if isinstance(reply, EquipoiseError):
        name = next(kind.__name__ for kind in type(reply).__mro__ if kind.__name__ in _ERRORS)
        field = reply.field if isinstance(reply, InvalidInputError) else None
        return json.dumps({"error": {"type": name, "message": str(reply), "field": field}})
    return json.dumps(jsonable(reply))


def decode_reply(command: Command[R], text: str) -> R:
    """The reply to ``command``, as the rank gave it.

    Raises:
        EquipoiseError: the one that the rank answered with.
    """
    fields = json.loads(text)
    if isinstance(fields, dict) and set(fields) == {"error"} and fields["error"]:
        kind, message = _ERRORS[fields["error"]["type"]], fields["error"]["message"]
        if issubclass(kind, InvalidInputError):
            raise kind(message, field=fields["error"]["field"])
        raise kind(message)
    (reply_type,) = get_args(type(command).__orig_bases__[0])  # type: ignore[attr-defined]
    return cast(R, TypeAdapter(reply_type).validate_python(fields))
