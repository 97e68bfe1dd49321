"""Exchanges the rounds of a rank's program with its peers, several of them at a time.

Rounds are not taken by all ranks together: a rank posts its next one as soon as fewer than ``rounds_in_flight`` of its
own are under way and what the round passes on has arrived. So the latency of one round hides behind the bytes of
another, and nobody waits for a rank that it exchanges nothing with.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

from equipoise.distributed.communicator import Communicator, Pending
from equipoise.transfer.memory.store import ExpertStore
from equipoise.transfer.planning.rank_program import RankProgram, Round, is_staging, staging_index


class Throttle:
    """Sleeps after each round for as long as the duty cycle asks.

    What a round takes includes waiting for peers, and they sleep too: sleeping in proportion to it would make the ranks
    wait for each other longer and longer. So the work itself is taken from the bytes and the fastest byte seen so far.

    Args:
        duty: duty cycle, the share of the time, in (0, 1], that may go to transfers; 1: never sleeps.
    """

    def __init__(self, duty: float, sleep: Callable[[float], None] = time.sleep) -> None:
        assert 0 < duty <= 1, f"{duty=}"
        self._rest_per_second = 1.0 / duty - 1.0
        self._sleep = sleep
        self._seconds_per_byte = float("inf")

    def rest(self, num_bytes: int, seconds: float) -> None:
        """After a round that moved ``num_bytes`` in ``seconds``."""
        if not self._rest_per_second or not num_bytes:
            return
        self._seconds_per_byte = min(self._seconds_per_byte, seconds / num_bytes)
        self._sleep(num_bytes * self._seconds_per_byte * self._rest_per_second)


_MIN_WAIT_SECONDS = 0.001
"""What is left to a round once the deadline has passed: it may well be through."""


class TransferPipeline:
    """Brings experts from live slots of this rank, and from its staging where it relays, to the staging of others.

    Args:
        communicator: reaches the other ranks.
        store: the experts of this rank; it has a send buffer for each round in flight.
        rounds_in_flight: rounds of which the rank may be in the middle; with a ``duty`` below 1 it is 1.
        duty: duty cycle of transfers, in (0, 1].
        clock: seconds, monotonic.
        sleep: for ``duty``.
    """

    def __init__(
        self,
        communicator: Communicator,
        store: ExpertStore,
        rounds_in_flight: int,
        duty: float,
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        assert rounds_in_flight >= 1, f"{rounds_in_flight=}"
        self._communicator = communicator
        self._store = store
        # What is under way moves on while the rank rests: with more than one round that would be no rest.
        self._rounds_in_flight = rounds_in_flight if duty == 1.0 else 1
        self._throttle = Throttle(duty, sleep)
        self._clock = clock

    def run(self, layer_id: int, program: RankProgram, deadline: float) -> None:
        """Returns once all that this rank sends and receives is through; what it receives then lies in staging.

        Args:
            program: its part in a batch of that layer; staging is reserved for it.
            deadline: on ``clock``, for all rounds together.

        Raises:
            TransferTimeout: a peer did not answer before the deadline.
            TransferError: a peer never will.
        """
        under_way: deque[tuple[Round, Pending]] = deque()
        began, moved, expert_bytes = self._clock(), 0, self._store.expert_bytes(layer_id)
        for number, each in enumerate(program.rounds):
            while under_way and (len(under_way) == self._rounds_in_flight or _awaits_one_of(each, under_way)):
                self._wait(under_way.popleft()[1], deadline)
                self._throttle.rest(moved, self._clock() - began)
                began, moved = self._clock(), 0
            # Hazard: a send buffer is written here while earlier rounds are under way. It is that of the round
            # rounds_in_flight before, which has been waited for.
            index = number % self._rounds_in_flight
            sends = self._store.outgoing(layer_id, each.send, index) if each.send else []
            recvs = self._store.incoming(layer_id, each.receive) if each.receive else []
            under_way.append((each, self._communicator.post(sends, recvs)))
            moved += expert_bytes * ((each.send is not None) + (each.receive is not None))
        for _, pending in under_way:
            self._wait(pending, deadline)

    def _wait(self, pending: Pending, deadline: float) -> None:
        pending.wait(max(deadline - self._clock(), _MIN_WAIT_SECONDS))


def _awaits_one_of(each: Round, under_way: Iterable[tuple[Round, Pending]]) -> bool:
    """Whether a round passes on what a round under way has yet to bring."""
    if each.send is None or not is_staging(each.send.place):
        return False
    awaited = staging_index(each.send.place)
    return any(before.receive and before.receive.staging_index == awaited for before, _ in under_way)
