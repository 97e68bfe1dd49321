"""Commands and their replies as JSON bytes, by a closed table: nothing that arrives names a class to be made."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from pydantic import TypeAdapter

from equipoise.errors import ConfigError, EquipoiseError, InvalidInputError, PhaseError, TransferError
from equipoise.load.recording import Dump
from equipoise.manager.commands import (
    Command,
    DumpRecording,
    ExpertLocationReply,
    GetExpertLocation,
    GetStatus,
    Pause,
    Rebalance,
    Resume,
    StartRecording,
    StatusReply,
    StopRecording,
)
from equipoise.manager.reports import RebalanceReport

_REPLIES: dict[type[Command[Any]], Any] = {
    StartRecording: None,
    StopRecording: None,
    DumpRecording: Dump | None,
    Rebalance: RebalanceReport,
    Pause: None,
    Resume: None,
    GetStatus: StatusReply,
    GetExpertLocation: ExpertLocationReply,
}
_COMMANDS = {command.__name__: command for command in _REPLIES}
_ERRORS: dict[str, type[EquipoiseError]] = {
    error.__name__: error for error in (ConfigError, PhaseError, TransferError, EquipoiseError)
}


def encode_command(command: Command[Any]) -> bytes:
    """JSON of a command of the table.

    Raises:
        ConfigError: one that SGLang's schedulers do not answer.
    """
    if type(command) not in _REPLIES:
        raise ConfigError(f"{type(command).__name__} is not answered here", field="command")
    return json.dumps({"command": type(command).__name__, "fields": dataclasses.asdict(command)}).encode()  # type: ignore[call-overload]


def decode_command(payload: bytes) -> Command[Any]:
    """The command that :func:`encode_command` wrote."""
    content = json.loads(payload)
    command: Command[Any] = _COMMANDS[content["command"]](**content["fields"])
    return command


def encode_reply(reply: object) -> bytes:
    """JSON of a reply, or of the error that a command failed with."""
    if isinstance(reply, EquipoiseError):
        known = next(error for error in type(reply).__mro__ if error.__name__ in _ERRORS)
        kind = ConfigError if isinstance(reply, InvalidInputError) else known
        error = {"type": kind.__name__, "message": str(reply), "field": getattr(reply, "field", None)}
        return json.dumps({"error": error}).encode()
    return json.dumps({"reply": dataclasses.asdict(reply) if reply is not None else None}).encode()  # type: ignore[call-overload]


def decode_reply(command: Command[Any], payload: bytes) -> Any:
    """The reply to ``command``.

    Raises:
        EquipoiseError: what the command failed with.
    """
    content = json.loads(payload)
    if (error := content.get("error")) is not None:
        if error["type"] == "ConfigError":
            raise ConfigError(error["message"], field=error["field"])
        raise _ERRORS[error["type"]](error["message"])
    return TypeAdapter(_REPLIES[type(command)]).validate_python(content["reply"])
