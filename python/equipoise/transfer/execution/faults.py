"""Faults on purpose: fail at (rank, layer, phase), so that tests can prove what the transfer path promises.

The updater calls :meth:`FaultInjector.at` at the start of each phase. Delays, exceptions and kills happen there; a
``drop`` or ``corrupt`` is returned for the updater to carry out, since only it has the messages in hand.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from equipoise.errors import ConfigError

FaultKind = Literal["drop", "delay", "corrupt", "raise", "kill"]
TransferPhase = Literal["transfer", "verify", "vote", "commit"]

_POSSIBLE: dict[str, tuple[str, ...]] = {
    "transfer": ("drop", "delay", "corrupt", "raise", "kill"),  # messages not sent; bytes flipped on the wire
    "verify": ("drop", "delay", "corrupt", "raise", "kill"),  # staging wiped; bytes flipped in staging
    "vote": ("drop", "delay", "raise", "kill"),  # no vote cast
    "commit": ("delay", "raise", "kill"),
}


class InjectedFault(RuntimeError):
    """Raised by a fault of kind ``raise``."""


@dataclass(frozen=True)
class Fault:
    """One planned fault."""

    kind: FaultKind
    rank: int
    phase: TransferPhase
    layer: int | None = None  # None: whichever layer comes first
    times: int = 1  # how often it happens
    seconds: float = 0.0  # of a delay

    def __post_init__(self) -> None:
        phases = get_args(TransferPhase)
        if self.phase not in phases:
            raise ConfigError(f"fault phase must be one of {phases}, got {self.phase!r}", field="phase")
        if self.kind not in _POSSIBLE[self.phase]:
            raise ConfigError(
                f"fault kind in phase {self.phase} must be one of {_POSSIBLE[self.phase]}, got {self.kind!r}",
                field="kind",
            )


class FaultInjector(Protocol):
    """Decides whether something goes wrong here."""

    def at(self, phase: TransferPhase, layer_id: int) -> FaultKind | None:
        """Called as ``phase`` of ``layer_id`` begins on this rank; returns ``drop`` or ``corrupt`` for the caller."""
        ...


class NoFaults:
    """Production."""

    def at(self, phase: TransferPhase, layer_id: int) -> FaultKind | None:
        del phase, layer_id
        return None


class ScheduledFaults:
    """Carries out the faults of a list that are meant for this rank, each as often as it says.

    Args:
        faults: for all ranks; those of others are ignored.
        rank: this one.
        sleep: for delays.
        kill: ends this process at once, without goodbye.
    """

    def __init__(
        self,
        faults: Sequence[Fault],
        rank: int,
        *,
        sleep: Callable[[float], None] = time.sleep,
        kill: Callable[[], None] = lambda: os.kill(os.getpid(), signal.SIGKILL),
    ) -> None:
        self._faults = [fault for fault in faults if fault.rank == rank]
        self._left = [fault.times for fault in self._faults]
        self._sleep = sleep
        self._kill = kill

    @property
    def num_left(self) -> int:
        """Faults that have not happened yet."""
        return sum(self._left)

    def at(self, phase: TransferPhase, layer_id: int) -> FaultKind | None:
        for index, fault in enumerate(self._faults):
            if not self._left[index] or fault.phase != phase or fault.layer not in (None, layer_id):
                continue
            self._left[index] -= 1
            if fault.kind == "delay":
                self._sleep(fault.seconds)
            elif fault.kind == "raise":
                raise InjectedFault(f"injected in {phase} of layer {layer_id}")
            elif fault.kind == "kill":
                self._kill()
            else:
                return fault.kind
        return None
