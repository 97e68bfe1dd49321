"""Messages of the pipes: launcher to rank 0 and back, supervisor to launcher. The package's docstring draws them."""

from __future__ import annotations

from dataclasses import dataclass

from equipoise.engine.requests import GenerateRequest, TokenEvent
from equipoise.errors import EquipoiseError
from equipoise.manager.commands import Command

# Launcher to rank 0 -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Submit:
    request: GenerateRequest


@dataclass(frozen=True)
class Abort:
    rid: str


@dataclass(frozen=True)
class Control:
    call_id: int
    command: Command


@dataclass(frozen=True)
class Ping:
    """Ask for a sign of life of all ranks. Answered with Pong."""


@dataclass(frozen=True)
class Stop:
    """End the engine: every rank leaves its loop and exits."""


ToEngine = Submit | Abort | Control | Ping | Stop


# Rank 0 to launcher -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ready:
    """All ranks can serve."""

    max_model_len: int  # tokens: the smaller of the option and what the model was made for
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    weight_bytes: tuple[int, ...]  # bytes of weights each rank read


@dataclass(frozen=True)
class Tokens:
    events: list[TokenEvent]


@dataclass(frozen=True)
class Reply:
    call_id: int
    value: object  # an EquipoiseError if the command failed


@dataclass(frozen=True)
class Pong:
    """All ranks have met in a barrier between two steps."""


# Supervisor to launcher ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Started:
    pids: tuple[int, ...]  # by rank


@dataclass(frozen=True)
class Died:
    """A rank ended when it should not have, or could not start. All others were ended too."""

    rank: int | None  # None: before the ranks were forked
    reason: str  # one line
    error: EquipoiseError | None = None  # what the rank raised, if it was one of ours

    @property
    def obituary(self) -> str:
        """Who has died, and why, in one line."""
        who = "the supervisor" if self.rank is None else f"rank {self.rank}"
        return f"{who} has died: {self.reason}"


@dataclass(frozen=True)
class Ended:
    """Every rank left as it was told to."""


FromEngine = Ready | Tokens | Reply | Pong | Started | Died | Ended
