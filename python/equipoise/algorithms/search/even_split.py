"""Evaluates and applies overwrites where replicas share alike, as hosts do that know no dispatch weights.

With n replicas each takes 1 / n of its expert's tokens. A replica more takes load off all the others, a replica less
adds to all of them: unlike a share that is solved along, it changes the load of every rank that holds the expert.
"""

from __future__ import annotations

import numpy as np

from equipoise.algorithms.forecast.scenarios import NUM_SCENARIOS
from equipoise.algorithms.search.layer_state import (
    COST,
    COUNT,
    FIRST,
    INVERSE_SPEED,
    NOISE,
    SLOPE,
    LayerState,
    add_share,
    power,
    refresh,
    relink,
)
from equipoise.jit.compile import helper, number


@helper
def split_evenly(state: LayerState) -> None:
    """Gives all replicas of an expert the same share; ``refresh`` the ranks afterwards."""
    expert, following, share, replicas, _, ranks, experts, _ = state
    for e in range(replicas.shape[0]):
        _set_shares(expert, following, share, replicas, ranks, experts, e, replicas[e, COUNT])


@helper
def _set_shares(
    expert: np.ndarray,
    following: np.ndarray,
    share: np.ndarray,
    replicas: np.ndarray,
    ranks: np.ndarray,
    experts: np.ndarray,
    e: int,
    count: int,
) -> None:
    """Gives each replica of expert ``e`` the share of one of ``count``."""
    slot = replicas[e, FIRST]
    while slot >= 0:
        add_share(expert, share, ranks, experts, slot, 1.0 / count - share[slot])
        slot = following[slot]


@helper
def even_change_gain(state: LayerState, e: int, count: int) -> float:
    """First-order gain (over q) of each replica of ``e`` taking one of ``count`` parts instead of what it has.

    The load ``w tokens + noise w ** 2`` is convex in the share w: what is charged is the change as it is.
    """
    _, following, share, replicas, _, ranks, experts, _ = state
    size = share.shape[0] // ranks.shape[0]
    gain = 0.0
    slot = replicas[e, FIRST]
    while slot >= 0:
        part, rank = 1.0 / count, slot // size
        risk = experts[e, NOISE] * (share[slot] * share[slot] - part * part)
        for s in range(NUM_SCENARIOS):
            gain += ranks[rank, SLOPE + s] * ((share[slot] - part) * experts[e, s] + risk)
        slot = following[slot]
    return gain


@helper
def _cost_of_holders(
    following: np.ndarray,
    replicas: np.ndarray,
    ranks: np.ndarray,
    weight: np.ndarray,
    size: int,
    doublings: int,
    e: int,
    others: int,
    held: np.ndarray,
) -> float:
    """Cost of the ranks that hold ``e`` and not ``others`` (-1: any): from their loads; as stored for -1 doublings."""
    total = 0.0
    slot = replicas[e, FIRST]
    while slot >= 0:
        rank = slot // size
        if others < 0 or held[rank, others] == 0:
            if doublings >= 0:
                for s in range(NUM_SCENARIOS):
                    total += weight[s] * power(ranks[rank, s], doublings)
            else:
                total += ranks[rank, COST]
        slot = following[slot]
    return total


@helper
def even_overwrite_gain(state: LayerState, slot: int, new: int, doublings: int) -> float:
    """Gain of giving ``slot`` to a further replica of ``new``; the state is as it was afterwards, but for rounding."""
    expert, following, share, replicas, held, ranks, experts, weight = state
    size = expert.shape[0] // ranks.shape[0]
    old, rank = expert[slot], slot // size
    n_new, n_old = replicas[new, COUNT], replicas[old, COUNT]
    any_expert, stored = number(-1), number(-1)
    # The slot's own rank holds `old`: it is among the ranks of `old`, and counted once.
    gain = _cost_of_holders(following, replicas, ranks, weight, size, stored, old, any_expert, held)
    gain += _cost_of_holders(following, replicas, ranks, weight, size, stored, new, old, held)
    _set_shares(expert, following, share, replicas, ranks, experts, new, n_new + 1)
    _set_shares(expert, following, share, replicas, ranks, experts, old, n_old - 1)
    # That counted the slot as one of the remaining: its part of `old` goes, a part of `new` comes.
    gone, come, slow = 1.0 / (n_old - 1), 1.0 / (n_new + 1), ranks[rank, INVERSE_SPEED]
    for s in range(NUM_SCENARIOS):
        more = come * (experts[new, s] + experts[new, NOISE] * come)
        ranks[rank, s] += (more - gone * (experts[old, s] + experts[old, NOISE] * gone)) * slow
    gain -= _cost_of_holders(following, replicas, ranks, weight, size, doublings, old, any_expert, held)
    gain -= _cost_of_holders(following, replicas, ranks, weight, size, doublings, new, old, held)
    for s in range(NUM_SCENARIOS):
        more = come * (experts[new, s] + experts[new, NOISE] * come)
        ranks[rank, s] -= (more - gone * (experts[old, s] + experts[old, NOISE] * gone)) * slow
    _set_shares(expert, following, share, replicas, ranks, experts, new, n_new)
    _set_shares(expert, following, share, replicas, ranks, experts, old, n_old)
    return gain


@helper
def overwrite_evenly(state: LayerState, slot: int, new: int, doublings: int) -> None:
    """Gives ``slot`` to a further replica of ``new`` and splits both experts evenly again."""
    expert, following, share, replicas, held, ranks, experts, weight = state
    old = expert[slot]
    add_share(expert, share, ranks, experts, slot, -share[slot])
    relink(expert, following, replicas, held, slot, new)
    _set_shares(expert, following, share, replicas, ranks, experts, old, replicas[old, COUNT])
    _set_shares(expert, following, share, replicas, ranks, experts, new, replicas[new, COUNT])
    for rank in range(ranks.shape[0]):
        refresh(ranks, weight, rank, doublings)
