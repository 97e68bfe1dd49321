"""Places replicas for dispatch that solves shares on each batch: as even as the best shares can make each scenario.

A placement with recourse (two-stage stochastic programming; Dantzig, 1955): slots are chosen now, shares once the load
is known. So a placement is worth the mean over scenarios of what the best shares reach (min_max.py), whose
certificate is a closed set of ranks: what they hold has all its replicas among them. A replica of one of their experts
on a rank outside connects the two. How much that can gain in each scenario is bounded by the tokens that the expert has
in the closed set and by what the other rank can take, so candidates are sorted by what these bounds let expect over all
scenarios, and tried from the top by exact value.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from equipoise.algorithms.search.batch_state import (
    LEAST,
    BatchFlows,
    coolest_replica,
    level_without,
    new_flows,
    reach_of,
    set_expert,
    sort_scenarios,
)
from equipoise.algorithms.search.layer_state import COUNT
from equipoise.algorithms.search.move_price import MoveTerms, origins_of, spent
from equipoise.jit.compile import helper, int_zeros, kernel, number, zeros

ENOUGH = 0.999  # balance that is not worth a step
LEAST_GAIN = 1e-4  # of balance, that a step has to bring after its price
NUM_CANDIDATES = 256  # most that a step tries
FULLNESS = 0.5  # of its bound, that a change is not expected to gain where the other rank is as loaded as the hottest
MAX_WORK = 8_000_000  # slots times scenarios of all changes that are tried for a layer: a limit on its time
NUM_TRIED = 16  # after these, the best that gains is taken


class Candidates(NamedTuple):
    """Changes of a slot's expert, the largest expected gain first."""

    expected: np.ndarray  # (NUM_CANDIDATES,) gain, -inf: none
    slot: np.ndarray
    expert: np.ndarray


@helper
def _bound_gains(flows: BatchFlows) -> None:
    """Fills ``room``: the closed set's load can fall by no more than the expert's tokens in it."""
    room, tokens, closed = flows.room, flows.tokens, flows.closed
    num_ranks = flows.inverse_speed.shape[0]
    size = flows.expert.shape[0] // num_ranks
    for s in range(room.shape[1]):
        capacity = 0.0
        for e in range(room.shape[0]):
            room[e, s] = 0.0
        for rank in range(num_ranks):
            if closed[s, rank] == 1:
                capacity += 1.0 / flows.inverse_speed[rank]
                for slot in range(rank * size, (rank + 1) * size):
                    room[flows.expert[slot], s] += tokens[s, slot]
        for e in range(room.shape[0]):
            if room[e, s] > LEAST:
                lowest = max(1.0 / flows.balance[s] - room[e, s] / capacity, 1.0)
                room[e, s] = max(1.0 / lowest - flows.balance[s], 0.0) / room.shape[1]
            else:
                room[e, s] = 0.0


@helper
def _bound_takers(flows: BatchFlows) -> None:
    """Fills ``taking``: a rank connected with the closed set shares its load with what it can hand load to itself."""
    closed, load, inverse_speed = flows.closed, flows.load, flows.inverse_speed
    spare, num_ranks = flows.balance.shape[0], inverse_speed.shape[0]
    for s in range(spare):
        base, base_capacity = 0.0, 0.0
        for rank in range(num_ranks):
            if closed[s, rank] == 1:
                base += load[s, rank]
                base_capacity += 1.0 / inverse_speed[rank]
        for start in range(num_ranks):
            flows.taking[s, start] = 0.0
            if closed[s, start] == 1 or inverse_speed[start] == 0.0:
                continue
            total, capacity = base, base_capacity
            for i in range(reach_of(flows, s, start, spare)):
                rank = flows.scratch[0, i]
                if closed[s, rank] == 0:
                    total += load[s, rank]
                    capacity += 1.0 / inverse_speed[rank]
            flows.taking[s, start] = max(min(capacity / total, 1.0) - flows.balance[s], 0.0) / spare


@helper
def _redundant_slot(flows: BatchFlows, rank: int) -> int:
    """The slot of a rank that holds one of several replicas and has the fewest tokens over all scenarios; -1: none."""
    size = flows.expert.shape[0] // flows.inverse_speed.shape[0]
    best, least = number(-1), np.inf
    for slot in range(rank * size, (rank + 1) * size):
        if flows.inverse_speed[rank] > 0.0 and flows.replicas[flows.expert[slot], COUNT] > 1:
            used = 0.0
            for s in range(flows.balance.shape[0]):
                used += flows.tokens[s, slot]
            if used < least:
                best, least = slot, used
    return best


@helper
def _find_candidates(flows: BatchFlows, origin: np.ndarray, moves: MoveTerms, made: int, found: Candidates) -> None:
    """Fills ``found`` with the changes that may gain most for their price."""
    room, taking, closed, last = flows.room, flows.taking, flows.closed, found.expected.shape[0] - 1
    for i in range(last + 1):
        found.expected[i] = -np.inf
    for rank in range(flows.inverse_speed.shape[0]):
        slot = _redundant_slot(flows, rank)
        if slot < 0:
            continue
        for e in range(room.shape[0]):
            if flows.held[rank, e] > 0 or (origin[rank, e] > 0 and made >= moves.max_moves):
                continue
            expected = -_price(flows, origin, moves, slot, e)
            for s in range(room.shape[1]):
                if closed[s, rank] == 0 and room[e, s] > 0.0:
                    full = flows.load[s, rank] * flows.inverse_speed[rank] * flows.balance[s]
                    expected += min(room[e, s], taking[s, rank]) * (1.0 - FULLNESS * full)
            if expected <= max(found.expected[last], LEAST_GAIN):
                continue
            i = last
            while i > 0 and found.expected[i - 1] < expected:
                found.expected[i] = found.expected[i - 1]
                found.slot[i], found.expert[i] = found.slot[i - 1], found.expert[i - 1]
                i -= 1
            found.expected[i], found.slot[i], found.expert[i] = expected, slot, e


@helper
def _price(flows: BatchFlows, origin: np.ndarray, moves: MoveTerms, slot: int, e: int) -> float:
    """Balance that a change has to gain."""
    row = origin[slot // (flows.expert.shape[0] // origin.shape[0])]
    return moves.slot_price * (moves.prices[row[e]] - moves.prices[row[flows.expert[slot]]])


@helper
def _gain(flows: BatchFlows, slot: int, e: int, least: float) -> float:
    """Mean balance that a change gains; where it cannot be ``least``, something below that."""
    tokens, load, closed, balance, room = flows.tokens, flows.load, flows.closed, flows.balance, flows.room
    spare, num_scenarios = balance.shape[0], balance.shape[0]
    size = flows.expert.shape[0] // flows.inverse_speed.shape[0]
    rank, gained, left = slot // size, 0.0, 0.0
    for s in range(num_scenarios):
        left += 0.0 if closed[s, rank] == 1 else min(room[e, s], flows.taking[s, rank])
    if left < least:
        return left
    old = set_expert(flows, slot, e)
    for i in range(num_scenarios):
        s = flows.order[i]
        if closed[s, rank] == 1 or room[e, s] == 0.0:  # it cannot gain, but losing the slot may cost
            if tokens[s, slot] <= LEAST:
                continue
            other = coolest_replica(flows.following, flows.replicas, load[s], flows.inverse_speed, size, old) // size
            if (load[s, other] + tokens[s, slot]) * flows.inverse_speed[other] * balance[s] <= 1.0:
                continue
        else:
            left -= min(room[e, s], flows.taking[s, rank])
        tokens[spare, :], load[spare, :] = tokens[s], load[s]
        gained += (level_without(flows, spare, slot, old) - balance[s]) / num_scenarios
        if gained + left < least:
            break
    set_expert(flows, slot, old)
    return gained + left


@helper
def _best_change(
    flows: BatchFlows, origin: np.ndarray, moves: MoveTerms, found: Candidates, max_tries: int
) -> tuple[int, int, int]:
    """Slot and expert of the change among the first that gains most after its price, -1: none; how many were tried."""
    best, best_slot, best_expert, tried = LEAST_GAIN, number(-1), number(-1), 0
    for i in range(min(found.expected.shape[0], max_tries)):
        if found.expected[i] == -np.inf or (i >= NUM_TRIED and best_slot >= 0):
            break
        tried += 1
        slot, e = found.slot[i], found.expert[i]
        price = _price(flows, origin, moves, slot, e)
        gained = _gain(flows, slot, e, best + price) - price
        if gained > best:
            best, best_slot, best_expert = gained, slot, e
    return best_slot, best_expert, tried


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
    """Improves rows first..last-1 of ``placed`` (L, P) for ``loads`` (L, E, S), in place.

    ``value`` (L,) takes the mean balance over the scenarios with the best shares for each, less the price of the moves
    from ``old`` (L, P).
    """
    num_experts, num_ranks = loads.shape[1], inverse_speed.shape[0]
    found = Candidates(zeros(NUM_CANDIDATES), int_zeros(NUM_CANDIDATES), int_zeros(NUM_CANDIDATES))
    for layer in range(first, last):
        origin = origins_of(old[layer], num_experts, num_ranks, ranks_per_node)
        flows = new_flows(placed[layer], loads[layer], inverse_speed)
        price, made = spent(placed[layer], origin, moves.prices)
        mean = sort_scenarios(flows)
        tries = MAX_WORK // (placed.shape[1] * loads.shape[2])
        for _ in range(max_steps):
            if mean >= ENOUGH or tries <= 0:
                break
            _bound_gains(flows)
            _bound_takers(flows)
            _find_candidates(flows, origin, moves, made, found)
            slot, e, tried = _best_change(flows, origin, moves, found, tries)
            tries -= tried
            if slot < 0:
                break
            before = set_expert(flows, slot, e)
            for s in range(flows.balance.shape[0]):
                flows.balance[s] = level_without(flows, s, slot, before)
            price, made = spent(placed[layer], origin, moves.prices)
            mean = sort_scenarios(flows)
        value[layer] = mean - moves.slot_price * price
