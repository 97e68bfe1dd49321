"""Swaps slots so that the hottest ranks can hand load on to ranks they could not reach (an ejection chain's step).

Once the shares of a placement are exact (min_max.py), what keeps the maximum up is a closed set of ranks: all replicas
of the experts with a share there lie there. No choice of shares helps, and an exchange of two slots with the shares
that they have seldom gains. But one that takes a replica of such an expert out of the set connects it with the ranks
outside, and ranks that are connected become level. So exchanges are judged by the loads after the shares are exact
again: the hottest set is connected with cooler ranks, one after the other, until that lowers nothing.
"""

from __future__ import annotations

import numpy as np

from equipoise.algorithms.search.changes import swap
from equipoise.algorithms.search.layer_state import COUNT, INVERSE_SPEED, LayerState, power
from equipoise.algorithms.search.min_max import level_ranks
from equipoise.jit.compile import helper, inlined, int_zeros, number, zeros

ENOUGH = 5e-3  # above the mean: where the hottest rank is closer than that, nothing is tried
_NUM_COOL = 8  # ranks outside of the set that are tried, the coolest first
_NUM_TRIES = 24  # slots of the set that each of their slots is exchanged with
_MIN_GAIN = 1e-4  # of the cost, sum load ** 64; ranks that are as hot and stay so must not hide a gain
_DOUBLINGS = 6


@inlined
def eject(state: LayerState, exchanges: bool) -> None:
    """Lowers the maximum load of the first scenario by shares and, if allowed, by exchanges while they gain; in place.

    Other loads change only along the way; ``cost`` and ``slope`` are left stale.
    """
    expert, ranks = state.expert, state.ranks
    num_ranks = ranks.shape[0]
    size = expert.shape[0] // num_ranks
    reached, queue, unused, spare = (
        int_zeros(num_ranks),
        int_zeros(num_ranks),
        int_zeros(num_ranks),
        int_zeros(num_ranks),
    )
    old_share, old_load = zeros(expert.shape[0]), zeros(num_ranks)
    num_closed = level_ranks(state, reached, queue)
    found = exchanges
    while found:
        hottest = number(0)
        for rank in range(num_ranks):
            if ranks[rank, 0] > ranks[hottest, 0]:
                hottest = rank
        if ranks[hottest, 0] <= 1.0 + ENOUGH:
            return
        found = False
        for _ in range(_NUM_COOL):
            coolest = number(-1)
            for rank in range(num_ranks):
                outside = reached[rank] == 0 and ranks[rank, INVERSE_SPEED] > 0.0
                if outside and (coolest < 0 or ranks[rank, 0] < ranks[coolest, 0]):
                    coolest = rank
            if coolest < 0:
                return
            reached[coolest] = 1  # not to be looked at again
            for slot in range(coolest * size, (coolest + 1) * size):
                found = found or _exchange_that_gains(
                    state, slot, queue[:num_closed], old_share, old_load, unused, spare
                )
            if found:
                num_closed = level_ranks(state, reached, queue)
                break


@inlined
def _exchange_that_gains(
    state: LayerState,
    slot: int,
    hot: np.ndarray,
    old_share: np.ndarray,
    old_load: np.ndarray,
    reached: np.ndarray,
    queue: np.ndarray,
) -> bool:
    """Makes the first exchange of ``slot`` with one of the ranks ``hot`` that lowers the cost; False if none does.

    The last four, (P,) and three (G,), are scratch.
    """
    expert, _, share, replicas, held, ranks, experts, _ = state
    size = expert.shape[0] // ranks.shape[0]
    cool, e = slot // size, expert[slot]
    for near in range(expert.shape[0]):
        old_share[near] = share[near]
    for rank in range(ranks.shape[0]):
        old_load[rank] = ranks[rank, 0]
    most = _cost(ranks) * (1.0 - _MIN_GAIN)
    tries = 0
    for rank in hot:
        for other in range(rank * size, (rank + 1) * size):
            f = expert[other]
            if held[cool, f] > 0 or held[rank, e] > 0 or tries == _NUM_TRIES:
                continue
            if replicas[f, COUNT] < 2 and experts[f, 0] <= share[slot] * experts[e, 0]:
                continue  # it connects nothing, and what comes is no less than what goes
            tries += 1
            swap(state, slot, other)
            level_ranks(state, reached, queue)
            if _cost(ranks) <= most:
                return True
            swap(state, slot, other)
            for near in range(expert.shape[0]):
                share[near] = old_share[near]
            for near in range(ranks.shape[0]):
                ranks[near, 0] = old_load[near]
    return False


@helper
def _cost(ranks: np.ndarray) -> float:
    total = 0.0
    for rank in range(ranks.shape[0]):
        total += power(ranks[rank, 0], number(_DOUBLINGS))
    return total
