"""`equipoise`, the default: joint placement and dispatch weights, from the placement in force, with priced moves.

Per layer: the shares of the placement in force settle on the load to come (scenarios.py); a local search
(local_search.py) makes the moves that pay; where enough balance is left on the table to pay for it, a plan from
nothing (fresh_plan.py), its ranks renamed after the old ones (relabel.py), is searched as well, and the better of the
two wins. Without a placement in force, moves are free and only the plan from nothing is made.

`reweight` does the first of these alone: it moves nothing.

A single window is no sample to spread risk over. There the shares are finished by the exact least maximum for the
placement (min_max.py).
"""

from __future__ import annotations

import numpy as np

from equipoise.algorithms.kernel import helper, kernel
from equipoise.algorithms.fresh_plan import pack, pack_groups, risk_load
from equipoise.algorithms.layer_state import LayerState, new_state, settle_all
from equipoise.algorithms.layers import for_each_layer
from equipoise.algorithms.local_search import ELSEWHERE, ON_NODE, ON_RANK, origin, search, spent
from equipoise.algorithms.min_max import level_ranks
from equipoise.algorithms.problem import Placement, PlacementProblem
from equipoise.algorithms.relabel import align, relabel
from equipoise.algorithms.repair import lost_experts, part_twins, revive, spread_shares
from equipoise.algorithms.scenarios import make_scenarios
from equipoise.errors import ConfigError

NODE_PRICE = 2.0  # of a move whose weights come from another node; within a node it is 1
RISK_PRICE = 4.0  # of an expert's variance, see layer_state.py
STAGES = (3, 5)  # exponents of the soft maximum: 2**3 = 8, then 32
SLOWEST = 1e-3  # of the fastest rank: slower ones count as this slow, so that powers of their load stay finite
LEAST_GAIN = 4e-3  # of the cost, that a step has to bring even when moves are free
SINGLE_LEAST_GAIN = 2e-4  # the same where there is one window, and nothing but that window to fit
NO_LIMIT = 1 << 60


def solve(problem: PlacementProblem) -> Placement:
    """Solves placement and dispatch weights together.

    Raises:
        ConfigError: ``max_moves_per_layer`` leaves too few moves to keep the experts of ranks that are gone, or a node
            has too few live slots for its expert groups.
    """
    num_slots = problem.topology.num_slots
    several = problem.load.shape[0] > 1
    # From nothing, with several windows to please, the first few steps bring what carries over to the next window.
    return _solve(problem, max_steps=max(24, num_slots // 16) if problem.current is None and several else num_slots)


def solve_weights(problem: PlacementProblem) -> Placement:
    """Re-solves the dispatch weights of the current placement, contiguous if there is none; no slot changes.

    Raises:
        ConfigError: an expert has no replica on a rank with a capacity above 0.
    """
    return _solve(problem, max_steps=0)


def _solve(problem: PlacementProblem, max_steps: int) -> Placement:
    topology, current = problem.topology, problem.current
    num_layers, num_experts, num_slots = problem.num_layers, problem.num_logical_experts, topology.num_slots
    slowness = _slowness(problem)
    scenarios = make_scenarios(problem.load, float((slowness > 0).sum()))
    placed = np.empty((num_layers, num_slots), dtype=np.int64)
    if current is not None:
        placed[:] = current.physical_to_logical_map.cpu().numpy()
        share = current.dispatch_weights.cpu().numpy().astype(np.float64)
    else:
        placed[:] = np.arange(num_slots) % num_experts
        share = np.zeros((num_layers, num_slots))
    lost = np.zeros(num_layers, dtype=np.int64)
    limit = problem.max_moves_per_layer
    for_each_layer(
        _solve_layer,
        num_layers,
        problem.num_threads,
        placed,
        share,
        np.concatenate([scenarios.tokens, scenarios.noise[..., None] * RISK_PRICE], axis=2),
        scenarios.weight,
        scenarios.any_load,
        slowness,
        topology.ranks_per_node,
        problem.num_groups if problem.grouped and problem.num_groups else 0,
        current is None and max_steps > 0,
        problem.move_price / num_slots,
        NO_LIMIT if limit is None or current is None else limit,
        np.array(STAGES),
        max_steps,
        problem.load.shape[0] == 1,
        lost,
    )
    if lost.any():
        layer = int(np.flatnonzero(lost)[0])
        raise ConfigError(
            f"rank_capacity leaves experts of layer {layer} without a live rank, and "
            + (
                "weights alone cannot bring them back"
                if max_steps == 0
                else f"max_moves_per_layer={limit}, num_groups={problem.num_groups} leave no slot to copy them to"
            ),
            field="rank_capacity",
        )
    return Placement(placed, share)


def _slowness(problem: PlacementProblem) -> np.ndarray:
    """(G,) mean speed of live ranks / speed of a rank; 0 for a rank that is gone."""
    capacity = problem.rank_capacity
    if capacity is None:
        return np.ones(problem.topology.num_ranks)
    live = capacity > 0
    speed = np.maximum(capacity / capacity.max(), SLOWEST)
    return np.where(live, speed[live].sum() / live.sum() / speed, 0.0)


@kernel
def _solve_layer(
    layer: int,
    placed: np.ndarray,
    share: np.ndarray,
    experts: np.ndarray,
    weight: np.ndarray,
    any_load: np.ndarray,
    slowness: np.ndarray,
    ranks_per_node: int,
    num_groups: int,
    from_nothing: bool,
    slot_price: float,
    limit: int,
    stages: np.ndarray,
    max_steps: int,
    exact: bool,
    lost: np.ndarray,
) -> None:
    """Replaces row ``layer`` of ``placed`` and ``share`` (L, P) by the plan; ``lost`` marks a layer without one."""
    num_slots, num_ranks, num_experts = placed.shape[1], slowness.shape[0], experts.shape[1]
    size, domain = num_slots // num_ranks, ranks_per_node if num_groups > 0 else num_ranks
    prices = np.zeros(3)
    if not from_nothing:
        prices[ON_NODE], prices[ELSEWHERE] = 1.0, NODE_PRICE
    old = placed[layer].copy()
    best = new_state(old.copy(), share[layer].copy(), experts[layer], weight, slowness)
    if max_steps == 0:
        lost[layer] = lost_experts(best)
        if lost[layer] == 0:
            spread_shares(best)
            for stage in range(stages.shape[0]):
                settle_all(best, stages[stage], np.int64(40), 1e-6)
    else:
        where = origin(old, num_experts, num_ranks, ranks_per_node)
        home, whole = _home_of_experts(old, num_groups, num_ranks // ranks_per_node, num_experts)
        least_gain = SINGLE_LEAST_GAIN if exact and from_nothing else LEAST_GAIN
        value = -np.inf
        # First from the placement in force, then from nothing where that could be better.
        for attempt in range(1 if from_nothing else 0, 2):
            state, alive = best, True
            if attempt == 0:
                moves = revive(state, home, ranks_per_node)
                alive = 0 <= moves <= limit and (whole or limit < NO_LIMIT)
                if alive:
                    part_twins(state, where, home, ranks_per_node, limit - moves)
                    spread_shares(state)
                    if not any_load[layer]:
                        value = 1.0
                        break
            else:
                if value >= 1.0 - 0.5 * slot_price * num_slots:
                    break  # a plan from nothing moves more than half of the slots
                state, alive = _fresh_state(
                    experts[layer], weight, old, slowness, num_groups, domain, where, prices
                )
                price, moves = spent(state.expert, where, prices)
                alive = alive and moves <= limit and 1.0 - slot_price * price > value
            if alive:
                found = search(
                    state, where, prices, slot_price, domain, limit, stages, max_steps, least_gain
                )
                if found > value:
                    best, value = state, found
        lost[layer] = value == -np.inf
    if lost[layer] > 0:
        return
    if exact:
        level_ranks(best)
    if not from_nothing:
        align(best.expert, best.share, old, size)
    for slot in range(num_slots):
        placed[layer, slot] = best.expert[slot]
        live = slowness[slot // size] > 0.0
        share[layer, slot] = min(max(best.share[slot], 0.0), 1.0) if live else 0.0


@helper
def _home_of_experts(
    expert: np.ndarray, num_groups: int, num_nodes: int, num_experts: int
) -> tuple[np.ndarray, bool]:
    """(E,) node that holds each expert's group, -1 for none; False where groups are asked for but not whole."""
    home = np.empty(num_experts, dtype=np.int64)
    for e in range(num_experts):
        home[e] = -1
    if num_groups == 0:
        return home, True
    slots_per_node, size = expert.shape[0] // num_nodes, num_experts // num_groups
    whole = True
    for slot in range(expert.shape[0]):
        node, first = slot // slots_per_node, expert[slot] // size * size
        if home[first] >= 0 and home[first] != node:
            whole = False
        for e in range(first, first + size):
            home[e] = node
    if not whole:
        for e in range(num_experts):
            home[e] = -1
    return home, whole


@helper
def _fresh_state(
    experts: np.ndarray,
    weight: np.ndarray,
    old: np.ndarray,
    slowness: np.ndarray,
    num_groups: int,
    domain: int,
    where: np.ndarray,
    prices: np.ndarray,
) -> tuple[LayerState, bool]:
    """A plan from nothing; False where a node has too few live slots for its experts."""
    num_experts, num_ranks = experts.shape[0], slowness.shape[0]
    size, num_domains = old.shape[0] // num_ranks, num_ranks // domain
    load = risk_load(experts, weight)
    expert = old.copy()
    node_of = np.zeros(num_experts, dtype=np.int64)
    if num_groups > 0:
        node_of = pack_groups(load, num_groups, num_domains)
    enough = True
    for block in range(num_domains):
        ranks, mine = np.empty(domain, dtype=np.int64), np.empty(num_experts, dtype=np.int64)
        num_live, num_mine = 0, 0
        for rank in range(block * domain, (block + 1) * domain):
            if slowness[rank] > 0.0:
                ranks[num_live] = rank
                num_live += 1
        for e in range(num_experts):
            if node_of[e] == block:
                mine[num_mine] = e
                num_mine += 1
        if num_live * size < num_mine:
            enough = False
        else:
            pack(mine[:num_mine], load, ranks[:num_live], slowness, size, expert)
    if enough and prices[ELSEWHERE] > 0.0:
        expert = relabel(expert, where, prices, slowness, domain)
    state = new_state(expert, np.zeros(old.shape[0]), experts, weight, slowness)
    if enough:
        spread_shares(state)
    return state, enough
