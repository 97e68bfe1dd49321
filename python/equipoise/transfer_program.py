"""What one rank does in a step: whom it sends to, what it receives, and the copies that commit. Derived, pure.

Places on a rank are numbered in one range: ``0 .. S-1`` are its live slots, ``-1, -2, ...`` its staging slots
(:func:`staging_place`). A commit is a list of copies between places that can be executed one after the other:
a place is overwritten only after everything that needs its content has been copied. Slots that exchange their experts
in a cycle need one spare staging slot, whatever their number.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from equipoise.topology import EpTopology
from equipoise.transfer_plan import TransferStep


def staging_place(index: int) -> int:
    """The place of staging slot ``index``; ``~place`` is the index again."""
    return ~index


class Send(NamedTuple):
    peer: int  # rank
    expert: int
    place: int  # a live slot, or for a relay the staging slot that received the expert


class Receive(NamedTuple):
    peer: int
    expert: int
    staging_index: int


class Copy(NamedTuple):
    source: int  # place
    destination: int  # place


@dataclass(frozen=True)
class Round:
    """At most one send and one receive."""

    index: int
    send: Send | None
    receive: Receive | None


@dataclass(frozen=True)
class RankProgram:
    """One rank's part in a step."""

    rounds: tuple[Round, ...]  # those in which the rank takes part, ascending
    copies: tuple[Copy, ...]  # the commit, in order
    num_staging_slots: int  # experts that lie in staging at once, the spare of a cycle included


def rank_program(step: TransferStep, rank: int, topology: EpTopology) -> RankProgram:
    """Derives the part of ``rank``."""
    slots = topology.slots_of_rank(rank)
    table = step.transfer_table
    mine = table[
        ((table[:, 2] >= slots.start) & (table[:, 2] < slots.stop))
        | ((table[:, 3] >= slots.start) & (table[:, 3] < slots.stop))
    ]
    sends: dict[int, Send] = {}
    receives: dict[int, Receive] = {}
    staged: dict[int, int] = {}  # expert -> staging index
    for round_index, expert, source, destination, relayed in mine.tolist():
        source_rank, destination_rank = topology.rank_of_slot(source), topology.rank_of_slot(destination)
        if destination_rank == rank:
            staged[expert] = len(staged)
            receives[round_index] = Receive(source_rank, expert, staged[expert])
        else:
            place = staging_place(staged[expert]) if relayed else topology.local_slot(source)
            sends[round_index] = Send(destination_rank, expert, place)
    rounds = tuple(Round(i, sends.get(i), receives.get(i)) for i in sorted(sends.keys() | receives.keys()))
    copies = _commit_copies(
        step.old_map[slots.start : slots.stop].tolist(), step.new_map[slots.start : slots.stop].tolist(), staged
    )
    spare = any(copy.destination < 0 for copy in copies)
    return RankProgram(rounds, copies, max(len(staged), int(spare)))


def _commit_copies(before: list[int], after: list[int], staged: dict[int, int]) -> tuple[Copy, ...]:
    """Copies that turn ``before`` (expert per live slot) plus staging into ``after``."""
    place_of = {expert: slot for slot, expert in reversed(list(enumerate(before)))}
    place_of.update((expert, staging_place(index)) for expert, index in staged.items())
    source = {slot: place_of[new] for slot, (old, new) in enumerate(zip(before, after, strict=True)) if old != new}
    readers: dict[int, int] = defaultdict(int)
    for place in source.values():
        readers[place] += 1
    copies = []
    # A slot whose old content nobody waits for can be written; that releases its source, and so on down the chain.
    ready = [slot for slot in source if not readers[slot]]
    while ready:
        slot = ready.pop()
        place = source.pop(slot)
        copies.append(Copy(place, slot))
        readers[place] -= 1
        if place in source and not readers[place]:
            ready.append(place)
    # What is left are cycles. Staging has been emptied by now, so its first slot serves as the spare.
    while source:
        start, place = source.popitem()
        copies.append(Copy(start, staging_place(0)))
        slot = start
        while place != start:
            copies.append(Copy(place, slot))
            slot, place = place, source.pop(place)
        copies.append(Copy(staging_place(0), slot))
    return tuple(copies)
