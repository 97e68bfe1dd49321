"""The time of a commit, on a CPU by a clock and on a GPU by events."""

from __future__ import annotations

from typing import ClassVar

import torch

from equipoise.transfer.execution.stream import CommitTimer


def test_a_commit_is_timed_where_it_happens(monkeypatch):
    """On a GPU the host only queues it: events tell, and nobody waits for them."""

    class Event:
        reached = False
        made: ClassVar[list[Event]] = []

        def __init__(self, enable_timing):
            assert enable_timing
            self.made.append(self)

        def record(self):
            self.recorded = True

        def query(self):
            return Event.reached

        def elapsed_time(self, end):
            assert (self, end) == tuple(Event.made)
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = CommitTimer()
    assert timer.stop() is Event.made[1], "what staging waits for"
    assert all(event.recorded for event in Event.made)
    assert timer.seconds() is None
    Event.reached = True
    assert timer.seconds() == 0.25
    on_host = CommitTimer(iter([3.0, 3.5]).__next__)
    assert on_host.stop() is None
    assert on_host.seconds() == 0.5
