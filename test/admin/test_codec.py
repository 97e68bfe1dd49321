"""Commands and replies survive the way to a host's ranks and back as JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.admin.codec import COMMANDS, decode_command, decode_reply, encode_command, encode_reply
from equipoise.errors import ConfigError, EquipoiseError, PhaseError, TransferError, VerificationError
from equipoise.load.stream_report import RecordingReply, StreamReply, StreamReport
from equipoise.manager.commands import (
    Command,
    DumpRecording,
    DumpReply,
    ExpertLocationReply,
    GetExpertLocation,
    GetRecording,
    GetStatus,
    Pause,
    Rebalance,
    StartRecording,
)
from helpers.fake_engine import REPORT, FakeEngine

rebalances = st.builds(Rebalance, move_price=st.none() | st.floats(allow_nan=False, allow_infinity=False))
commands = rebalances | st.one_of(*(st.from_type(kind) for kind in COMMANDS.values() if kind is not Rebalance))


@given(commands)
def test_a_command_comes_back_as_it_went(command: Command[Any]) -> None:
    text = encode_command(command)
    assert json.loads(text)["command"] == type(command).__name__
    again = decode_command(text)
    assert type(again) is type(command)
    assert again == command


@pytest.mark.parametrize(
    ("text", "field", "said"),
    [
        ("nonsense", "command", "not JSON"),
        ("[1]", "command", "must be one of"),
        ('{"command": "__import__"}', "command", "must be one of"),
        ('{"command": "Rebalance", "dry": true}', "dry", "no field 'dry'"),
        ('{"command": "Rebalance", "dry_run": "yes"}', "dry_run", "got 'yes'"),
        ('{"command": "DumpRecording"}', "directory", "DumpRecording.directory"),
    ],
)
def test_what_is_no_command_is_refused_by_field(text: str, field: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        decode_command(text)
    assert caught.value.field == field


STREAMED = StreamReport("/d/n/rank_0.safetensors", 5, 5, 1, [[3, 3]], True, None)
LOCATION = ExpertLocationReply(2, 1, 2, 3, [4], [[0, 1, 2, 0]], [[0.5, 1.0, 1.0, 0.5]])


@pytest.mark.parametrize(
    ("command", "reply"),
    [
        (Rebalance(), REPORT),
        (GetStatus(), FakeEngine().status()),
        (GetExpertLocation(), LOCATION),
        (DumpRecording("d"), DumpReply("/d/f.npz", 3, 12)),
        (DumpRecording("d"), None),
        (StartRecording("per_pass", "d", "n"), RecordingReply(True, None)),
        (GetRecording(), RecordingReply(False, StreamReply("/d/n", "per_pass", True, [STREAMED]))),
        (Pause("x"), None),
    ],
)
def test_a_reply_comes_back_as_it_went(command: Command[Any], reply: object) -> None:
    assert decode_reply(command, encode_reply(reply)) == reply


class OfAHost(TransferError):
    """A class that the other side does not know."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PhaseError("not now"), PhaseError),
        (ConfigError("no", field="algorithm"), ConfigError),
        (VerificationError("damaged"), VerificationError),
        (OfAHost("gone"), TransferError),
        (EquipoiseError("what"), EquipoiseError),
    ],
)
def test_an_error_is_raised_as_the_nearest_kind_that_both_sides_know(error: EquipoiseError, kind: type) -> None:
    with pytest.raises(kind) as caught:
        decode_reply(Rebalance(), encode_reply(error))
    assert type(caught.value) is kind
    assert str(caught.value) == str(error)
    assert getattr(caught.value, "field", None) == getattr(error, "field", None)
