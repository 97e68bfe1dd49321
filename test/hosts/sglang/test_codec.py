"""Commands and replies cross SGLang's control channel as JSON and come out equal."""

from __future__ import annotations

import json
from typing import Any

import pytest

from equipoise.errors import ConfigError, EquipoiseError, LoadError, PhaseError, PlanMismatchError, TransferError
from equipoise.hosts.sglang.codec import decode_command, decode_reply, encode_command, encode_reply
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
)

COMMANDS: list[Command[Any]] = [
    Rebalance(),
    Rebalance(algorithm="deepseek", dry_run=True, max_moves_per_layer=3, window_steps=10, force=True),
    Pause("a test"),
    Resume(),
    GetStatus(),
    StartRecording(),
    DumpRecording("/somewhere"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: type(command).__name__)
def test_command_round_trip(command: Command[Any]) -> None:
    assert decode_command(encode_command(command)) == command


def test_command_outside_the_table_is_refused() -> None:
    class Homemade(Command[None]):
        pass

    with pytest.raises(ConfigError, match="Homemade"):
        encode_command(Homemade())
    with pytest.raises(KeyError):
        decode_command(json.dumps({"command": "Homemade", "fields": {}}).encode())


def test_reply_round_trip() -> None:
    reply = ExpertLocationReply(2, 1, 2, 3, [1], [[0, 1, 2, 0]], [[0.25, 1.0, 1.0, 0.75]])
    assert decode_reply(GetExpertLocation(), encode_reply(reply)) == reply
    assert decode_reply(Resume(), encode_reply(None)) is None


@pytest.mark.parametrize(
    ("error", "arrives_as"),
    [
        (ConfigError("wrong", field="algorithm"), ConfigError),
        (LoadError("wrong shape"), ConfigError),
        (PhaseError("not now"), PhaseError),
        (PlanMismatchError("differ"), TransferError),
        (EquipoiseError("else"), EquipoiseError),
    ],
)
def test_error_round_trip(error: EquipoiseError, arrives_as: type[EquipoiseError]) -> None:
    with pytest.raises(arrives_as) as caught:
        decode_reply(Rebalance(), encode_reply(error))
    assert str(caught.value) == str(error)
    assert getattr(caught.value, "field", None) == getattr(error, "field", None)
