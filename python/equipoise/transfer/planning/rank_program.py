"""Derives what one rank does in a batch: whom it sends to, what it receives, and the copies that commit.

Places on a rank are numbered in one range: ``0 .. S-1`` are its live slots, ``-1, -2, ...`` its staging slots
(:func:`staging_place`). A commit is a list of copies between places that can be executed one after the other:
a place is overwritten only after everything that needs its content has been copied. Slots that exchange their experts
in a cycle need one spare staging slot, whatever their number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from equipoise.jit.compile import helper, inlined, int32_empty_table, int32_zeros, kernel, number
from equipoise.topology import EpTopology
from equipoise.transfer.planning.types import TransferBatch

_NOWHERE = np.iinfo(np.int32).min


def staging_place(index: int) -> int:
    """Returns the place of staging slot ``index``: -1, -2, ..."""
    return ~index


def staging_index(place: int) -> int:
    """Returns the staging slot at ``place``, for which :func:`is_staging` holds."""
    return ~place


def is_staging(place: int) -> bool:
    """Tells a staging slot from a live one."""
    return place < 0


_staging_place = helper(staging_place)


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


class Round(NamedTuple):
    """At most one send and one receive."""

    number: int
    send: Send | None
    receive: Receive | None


@dataclass(frozen=True)
class RankProgram:
    """One rank's part in a batch."""

    rounds: tuple[Round, ...]  # those in which the rank takes part, ascending
    copies: tuple[Copy, ...]  # the commit, in order
    num_staging_slots: int  # experts that lie in staging at once, the spare of a cycle included


def rank_program(batch: TransferBatch, rank: int, topology: EpTopology) -> RankProgram:
    """Derives the part of ``rank``."""
    slots = topology.slots_of_rank(rank)
    received, messages = _messages(batch.transfer_table, slots.start, topology.slots_per_rank)
    rounds: list[Round] = []
    for nth, is_send, *message in messages.tolist():
        if not rounds or rounds[-1].number != nth:
            rounds.append(Round(nth, None, None))
        if is_send:
            rounds[-1] = Round(nth, Send(*message), rounds[-1].receive)
        else:
            rounds[-1] = Round(nth, rounds[-1].send, Receive(*message))
    copies, needs_spare = _commit_copies(
        batch.old_map[slots.start : slots.stop], batch.new_map[slots.start : slots.stop], received
    )
    num_staging_slots = max(len(received), int(needs_spare))
    return RankProgram(tuple(rounds), tuple(Copy(*copy) for copy in copies.tolist()), num_staging_slots)


def compile_program_kernels() -> None:
    """Compiles what :func:`rank_program` needs, or loads it from numba's cache, so that no transfer waits for it."""
    topology = EpTopology(2, 1, 1)
    old, new, table = (np.array(values, np.int32) for values in ([0, 1], [1, 0], [[0, 1, 1, 0, 0], [0, 0, 0, 1, 0]]))
    for array in (old, new, table):
        array.setflags(write=False)  # as a plan's arrays are: numba compiles read-only arrays apart
    rank_program(TransferBatch(old, new, table), 0, topology)


@kernel
def _messages(table: np.ndarray, first_slot: int, slots_per_rank: int) -> tuple[np.ndarray, np.ndarray]:
    """What a rank sends and receives, in the order of the table.

    Args:
        table: (transfers, 5) int32, columns of ``ExpertTransfer``, in round order.
        first_slot: of the rank.
        slots_per_rank: ``S``.

    Returns:
        The experts that it receives, (receives,) int32 by staging index; and (messages, 5) int32 with the columns
        round, 1 for a send and 0 for a receive, and those of :class:`Send` or :class:`Receive`.
    """
    rank = first_slot // slots_per_rank
    messages = int32_empty_table(table.shape[0], number(5))
    received = int32_zeros(table.shape[0])
    num_messages, num_received = 0, 0
    for transfer in range(table.shape[0]):
        source, destination = table[transfer, 2], table[transfer, 3]
        is_send = source // slots_per_rank == rank
        if not is_send and destination // slots_per_rank != rank:
            continue
        at, expert = num_messages, table[transfer, 1]
        num_messages += 1
        messages[at, 0], messages[at, 1], messages[at, 3] = table[transfer, 0], is_send, expert
        if is_send:
            messages[at, 2], messages[at, 4] = destination // slots_per_rank, source - first_slot
            if table[transfer, 4] > 0:
                index = 0
                while received[index] != expert:  # it has arrived in an earlier round
                    index += 1
                messages[at, 4] = _staging_place(index)
        else:
            messages[at, 2], messages[at, 4] = source // slots_per_rank, num_received
            received[num_received] = expert
            num_received += 1
    return received[:num_received], messages[:num_messages]


@kernel
def _commit_copies(before: np.ndarray, after: np.ndarray, received: np.ndarray) -> tuple[np.ndarray, bool]:
    """Orders the copies that turn ``before`` plus staging into ``after``.

    Args:
        before: (S,) int32, the expert of each live slot.
        after: (S,) int32.
        received: int32, the expert of each staging slot in use.

    Returns:
        (copies, 2) int32 with the columns of :class:`Copy`, and whether a cycle needs a staging slot for itself.
    """
    size = before.shape[0]
    source, readers = int32_zeros(size), int32_zeros(size)
    num_changed = _find_sources(before, after, received, source, readers)
    copies = int32_empty_table(2 * num_changed, number(2))
    num_in_chains = _copy_chains(source, readers, copies)
    num_copies = _copy_cycles(source, copies, num_in_chains)
    return copies[:num_copies], num_copies > num_in_chains


@inlined
def _find_sources(
    before: np.ndarray, after: np.ndarray, received: np.ndarray, source: np.ndarray, readers: np.ndarray
) -> int:
    """Writes ``source[slot]``, the place whose content the slot gets, and how many slots read each live one.

    ``source`` is ``_NOWHERE`` for slots that do not change; the number of those that do is returned.
    """
    num_changed = 0
    for slot in range(before.shape[0]):
        source[slot] = _NOWHERE
        if before[slot] == after[slot]:
            continue
        num_changed += 1
        for index in range(received.shape[0]):
            if received[index] == after[slot]:
                source[slot] = _staging_place(index)
                break
        if source[slot] == _NOWHERE:
            place = 0
            while place < before.shape[0] and before[place] != after[slot]:
                place += 1
            assert place < before.shape[0]  # the rank has the expert, or receives it: not true of one that is dead
            source[slot] = place
            readers[place] += 1
    return num_changed


@inlined
def _copy_chains(source: np.ndarray, readers: np.ndarray, copies: np.ndarray) -> int:
    """Writes the copies of slots that lie on no cycle; returns their number.

    A slot whose old content nobody waits for can be written; that releases its source, and so on down the chain.
    """
    num_copies = 0
    for end in range(source.shape[0]):
        slot = end
        while source[slot] != _NOWHERE and readers[slot] == 0:
            place = source[slot]
            copies[num_copies, 0], copies[num_copies, 1] = place, slot
            num_copies += 1
            source[slot] = _NOWHERE
            if place < 0:
                break
            readers[place] -= 1
            slot = place
    return num_copies


@inlined
def _copy_cycles(source: np.ndarray, copies: np.ndarray, num_copies: int) -> int:
    """Appends the copies of the cycles that are left behind the first ``num_copies``; returns the number of all.

    Staging has been emptied by now, so its first slot serves as the spare of each cycle in turn.
    """
    spare = _staging_place(number(0))
    for start in range(source.shape[0]):
        if source[start] == _NOWHERE:
            continue
        copies[num_copies, 0], copies[num_copies, 1] = start, spare
        num_copies += 1
        slot = start
        while source[slot] != start:
            place = source[slot]
            copies[num_copies, 0], copies[num_copies, 1] = place, slot
            num_copies += 1
            source[slot] = _NOWHERE
            slot = place
        copies[num_copies, 0], copies[num_copies, 1] = spare, slot
        num_copies += 1
        source[slot] = _NOWHERE
    return num_copies
