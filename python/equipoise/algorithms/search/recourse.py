"""Places replicas for dispatch that solves shares on each batch: as even as the best shares can make each scenario.

A placement with recourse (two-stage stochastic programming; Dantzig, 1955): slots are chosen now, shares once the load
is known. So a placement is worth the mean over scenarios of what the best shares reach (min_max.py: a flow, whose
minimum cut, a closed set of ranks, is the certificate). What keeps a scenario uneven is its closed set: a replica of
one of the set's experts on a rank outside connects the two. Such changes are tried by their exact value.
"""

from __future__ import annotations

import numpy as np

from equipoise.algorithms.forecast.scenarios import NUM_SCENARIOS
from equipoise.algorithms.search.layer_state import COUNT, INVERSE_SPEED, LayerState, new_state
from equipoise.algorithms.search.min_max import level_ranks, reach
from equipoise.algorithms.search.move_price import MoveTerms, origins_of, spent
from equipoise.algorithms.search.repair import spread_shares
from equipoise.jit.compile import helper, int_zeros, kernel, number, zeros

NUM_GIVEN = 3  # experts of the closed set that a step tries to place outside of it
NUM_TAKING = 3  # ranks outside that it tries, the coolest first
ENOUGH = 0.997  # balance that is not worth a step


@helper
def _levelled(placed: np.ndarray, loads: np.ndarray, s: int, inverse_speed: np.ndarray) -> LayerState:
    """The state of a placement with the best shares for scenario ``s`` of ``loads`` (E, K)."""
    experts, weight = np.empty((loads.shape[0], NUM_SCENARIOS + 1)), zeros(number(NUM_SCENARIOS))
    for e in range(loads.shape[0]):
        for column in range(NUM_SCENARIOS + 1):
            experts[e, column] = loads[e, s] if column == 0 else 0.0
    weight[0] = 1.0
    state = new_state(placed, zeros(placed.shape[0]), experts, weight, inverse_speed)
    spread_shares(state)
    level_ranks(state)
    return state


@helper
def _hottest(ranks: np.ndarray) -> int:
    hottest = number(0)
    for rank in range(ranks.shape[0]):
        if ranks[rank, 0] > ranks[hottest, 0]:
            hottest = rank
    return hottest


@helper
def recourse_value(placed: np.ndarray, loads: np.ndarray, inverse_speed: np.ndarray, balance: np.ndarray) -> float:
    """Mean over scenarios of mean / maximum rank load with the best shares; ``balance`` (K,) takes each."""
    total = 0.0
    for s in range(loads.shape[1]):
        ranks = _levelled(placed, loads, s, inverse_speed).ranks
        balance[s] = 1.0 / max(ranks[_hottest(ranks), 0], 1e-9)
        total += balance[s] / loads.shape[1]
    return total


@helper
def _taking_slot(state: LayerState, rank: int, size: int, given: int) -> int:
    """The redundant slot of a rank with the least load, for the expert ``given``; -1 if there is none."""
    best, least = number(-1), np.inf
    if state.held[rank, given] > 0:
        return best
    for slot in range(rank * size, (rank + 1) * size):
        e = state.expert[slot]
        tokens = state.share[slot] * state.experts[e, 0]
        if state.replicas[e, COUNT] > 1 and tokens < least:
            best, least = slot, tokens
    return best


@helper
def _best_connection(
    placed: np.ndarray,
    loads: np.ndarray,
    inverse_speed: np.ndarray,
    origin: np.ndarray,
    moves: MoveTerms,
    made: int,
    s: int,
    value: float,
) -> tuple[float, int, int]:
    """The best value less its price, slot and expert of a change that connects the closed set of scenario ``s``."""
    state = _levelled(placed, loads, s, inverse_speed)
    expert, ranks = state.expert, state.ranks
    num_ranks = ranks.shape[0]
    size = expert.shape[0] // num_ranks
    reached, queue, give, take = int_zeros(num_ranks), int_zeros(num_ranks), int_zeros(num_ranks), int_zeros(num_ranks)
    num_hot = reach(state, _hottest(ranks), reached, queue, give, take)
    best, best_slot, best_expert = value, number(-1), number(-1)
    balance, tried = zeros(loads.shape[1]), int_zeros(loads.shape[0])
    for _ in range(NUM_GIVEN):
        given, heaviest = number(-1), 0.0
        for i in range(num_hot):
            for slot in range(queue[i] * size, (queue[i] + 1) * size):
                tokens = state.share[slot] * state.experts[expert[slot], 0]
                if tried[expert[slot]] == 0 and tokens > heaviest:
                    given, heaviest = expert[slot], tokens
        if given < 0:
            break
        tried[given] = 1
        seen = reached.copy()
        for _ in range(NUM_TAKING):
            coolest = number(-1)
            for rank in range(num_ranks):
                open_rank = seen[rank] == 0 and ranks[rank, INVERSE_SPEED] > 0.0
                if open_rank and (coolest < 0 or ranks[rank, 0] < ranks[coolest, 0]):
                    coolest = rank
            if coolest < 0:
                break
            seen[coolest] = 1
            slot = _taking_slot(state, coolest, size, given)
            if slot < 0 or (origin[coolest, given] > 0 and made >= moves.max_moves):
                continue
            before = placed[slot]
            placed[slot] = given
            now = recourse_value(placed, loads, inverse_speed, balance)
            now -= moves.slot_price * spent(placed, origin, moves.prices)[0]
            placed[slot] = before
            if now > best:
                best, best_slot, best_expert = now, slot, given
    return best, best_slot, best_expert


@kernel
def improve_for_batches(
    first: int,
    last: int,
    old: np.ndarray,
    placed: np.ndarray,
    value: np.ndarray,
    loads: np.ndarray,
    inverse_speed: np.ndarray,
    ranks_per_node: int,
    moves: MoveTerms,
    max_steps: int,
) -> None:
    """Improves rows first..last-1 of ``placed`` (L, P) for ``loads`` (L, E, K), in place.

    ``value`` (L,) takes the mean balance over the scenarios with the best shares for each, less the price of the moves
    from ``old`` (L, P).
    """
    num_experts, num_ranks = loads.shape[1], inverse_speed.shape[0]
    balance = zeros(loads.shape[2])
    for layer in range(first, last):
        origin = origins_of(old[layer], num_experts, num_ranks, ranks_per_node)
        price, made = spent(placed[layer], origin, moves.prices)
        now = recourse_value(placed[layer], loads[layer], inverse_speed, balance) - moves.slot_price * price
        for _ in range(max_steps):
            worst = number(0)
            for s in range(balance.shape[0]):
                if balance[s] < balance[worst]:
                    worst = s
            if balance[worst] >= ENOUGH:
                break
            best, slot, e = _best_connection(
                placed[layer], loads[layer], inverse_speed, origin, moves, made, worst, now
            )
            if slot < 0:
                balance[worst] = 1.0  # nothing helps this scenario: the next worst
                continue
            placed[layer, slot] = e
            recourse_value(placed[layer], loads[layer], inverse_speed, balance)
            price, made = spent(placed[layer], origin, moves.prices)
            now = best
        value[layer] = now
