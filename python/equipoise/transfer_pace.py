"""Keeps a transfer to its share of the time, so that forward passes beside it keep the processor and the links."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """Rests after each round for as long as the duty asks.

    What a round takes includes waiting for peers, and they rest too: resting in proportion to it would make the ranks
    wait for each other longer and longer. So the work itself is taken from the bytes and the fastest byte seen so far.

    Args:
        duty: share of the time, in (0, 1], that may go to transfers; 1: never rests.
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
