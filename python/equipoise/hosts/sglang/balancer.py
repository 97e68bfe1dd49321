"""SglangBalancer: our manager in a scheduler process, as SGLang's hooks call it. Knows no SGLang itself.

::

    count              counts of a pass, from SGLang's recorder          during a forward pass
    end_pass           closes the pass and ticks                         after each forward pass
    turn               ticks where no pass ran since the last turn       once per turn of the event loop
    submit             a command; answered now or in a later turn        as a request of SGLang's
    hold, release      nothing moves while a reason is held              round a change of the weights

Passes, turns and requests come in the same order on all ranks.

Hazard: a rank that skips a tick commits layers one pass after the others, or has them wait for its messages. So each
step is guarded by itself: an error of one rank is noted, the rank goes on, and all ranks stop balancing together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from equipoise.hosts.sglang.live_maps import SglangMaps
from equipoise.manager.command_handler import PendingReply
from equipoise.manager.commands import Command
from equipoise.manager.manager import EplbManager
from equipoise.manager.reports import Phase

log = logging.getLogger("equipoise.hosts.sglang")

_LAYERS_PER_TICK = 4
"""Layers whose shares are written between two passes: each takes about a millisecond."""

OnPhase = Callable[[Phase], None]
OnReply = Callable[[object], None]
"""Takes a command's reply, or the EquipoiseError that it failed with."""


class SglangBalancer:
    """One for each scheduler, called alike.

    Args:
        manager: ours.
        maps: SGLang's.
        changed: rows of the placement that have committed and whose shares SGLang's maps do not follow yet; added to
            inside commits, emptied here.
        on_phase: told of the phase after whatever may have changed it.

    Attributes:
        ticks, idle_ticks: how often it was ticked after a pass, and in a turn without one.
    """

    def __init__(
        self, manager: EplbManager, maps: SglangMaps, changed: list[int], *, on_phase: OnPhase | None = None
    ) -> None:
        self.manager = manager
        self._maps = maps
        self._changed = changed
        self._on_phase = on_phase
        self.ticks = self.idle_ticks = 0
        self._stepped = False
        self._waiting: list[tuple[PendingReply[Any], OnReply]] = []
        self._holds: set[str] = set()
        self._paused_here = False

    @property
    def wants_tick(self) -> bool:
        """Turns carry something on even when no request runs. The same on all ranks."""
        return self.manager.wants_tick or bool(self._changed and self.manager.phase != "failed")

    def count(self, physical_counts: torch.Tensor) -> None:
        """Adds (L, P) tokens in each slot, a row for every layer of SGLang's."""
        with self.manager.failures.guard("counting a pass"):
            self.manager.record_counts(physical_counts)

    def end_pass(self) -> None:
        """After a forward pass of the target model, on every rank."""
        self._stepped = True
        self.ticks += 1
        self.manager.end_forward_pass(counted=True)
        self.manager.tick()
        self._follow_shares()
        self._answer()

    def turn(self) -> None:
        """Once per turn of the event loop. Whether a pass ran since the last one is the same on all ranks."""
        stepped, self._stepped = self._stepped, False
        if stepped or not self.wants_tick:
            return
        if self.manager.wants_tick:
            self.idle_ticks += 1
            self.manager.tick()
        self._follow_shares()
        self._answer()

    def submit(self, command: Command[Any], on_reply: OnReply) -> None:
        """Takes a command, in the same turn on all ranks."""
        self._waiting.append((self.manager.submit(command), on_reply))
        self._answer()

    def hold(self, reason: str) -> None:
        """Collective. Returns once nothing moves; nothing will before :meth:`release`."""
        if not self._holds and self.manager.phase not in ("paused", "failed"):
            self.manager.pause(reason)
            self._paused_here = True
        self._holds.add(reason)
        self._answer()

    def release(self, reason: str) -> None:
        """Collective, after the weights may have changed. Balancing goes on after the last hold, unless an operator has
        paused it."""
        with self.manager.failures.guard("taking note of new weights"):
            self.manager.weights_changed()
        self._holds.discard(reason)
        if not self._holds and self._paused_here:
            self._paused_here = False
            self.manager.resume()
        self._tell_phase()

    def _follow_shares(self) -> None:
        """Some layers' shares, once nothing moves and every rank has told the others that none has failed."""
        if self.manager.wants_tick or self.manager.phase == "failed":
            return
        placement = self.manager.placement
        rows = self._changed[:_LAYERS_PER_TICK]
        del self._changed[:_LAYERS_PER_TICK]
        with self.manager.failures.guard("writing shares"):
            for row in rows:
                self._maps.write_shares(placement.layer_ids[row], placement.committed, row)

    def _tell_phase(self) -> None:
        if self._on_phase is not None:
            with self.manager.failures.guard("showing the phase"):
                self._on_phase(self.manager.phase)

    def _answer(self) -> None:
        self._tell_phase()
        waiting, self._waiting = self._waiting, []
        for pending, on_reply in waiting:
            if pending.done:
                with self.manager.failures.guard("answering a command"):
                    on_reply(pending.reply)
            else:
                self._waiting.append((pending, on_reply))
