"""`equipoise`, the default: joint placement and dispatch weights, from the placement in force, with priced moves.

Per layer: the shares of the placement in force are optimised for the load to come (scenarios.py); a local search
(local_search.py) makes the moves that pay; where enough balance is left on the table to pay for it, a packing from
scratch (lpt_packing.py), its ranks renamed after the old ones (relabel.py), is searched as well, and the better of the
two wins. Without a placement in force, moves are free and only the packing from scratch is searched.

How far off the forecast is (risk.py) sets the price of risk. A single window is no sample to spread risk over: there
the shares are finished by the exact minimum of the maximum for the placement (min_max.py).
"""

from __future__ import annotations

import numpy as np

from equipoise.algorithms import deepseek
from equipoise.algorithms.batch_plan import plan_for_batches
from equipoise.algorithms.forecast.scenarios import NUM_SCENARIOS, Scenarios
from equipoise.algorithms.guard import Plan, keep_what_is_better, what_is_worth_a_search
from equipoise.algorithms.packing import NUM_FLATNESS, pack_from_scratch
from equipoise.algorithms.problem import PlacementProblem, Solution
from equipoise.algorithms.reweight import better_shares, solve_shares
from equipoise.algorithms.search.even_split import split_evenly
from equipoise.algorithms.search.layer_state import new_state
from equipoise.algorithms.search.local_search import SearchOptions, search
from equipoise.algorithms.search.move_price import ELSEWHERE, MoveTerms, origins_of, spent
from equipoise.algorithms.search.repair import home_of_experts, restore_lost_experts, split_colocated, spread_shares
from equipoise.algorithms.task import NODE_PRICE, Layers, Task
from equipoise.errors import ConfigError
from equipoise.jit.compile import kernel
from equipoise.placement.relabel import compile_relabelling, relabel

STAGES = (2, 3, 5)  # exponents of the power-sum surrogate: 2**2 = 4, then 8, then 32
SINGLE_STAGES = (3, 6)  # the same where there is one window
MIN_GAIN = 4e-3  # of the cost, that a step has to bring even when moves are free
SINGLE_MIN_GAIN = 2e-4  # the same where there is one window, and nothing but that window to fit
NUM_COOL, COOL_SLOTS = 6, 36  # ranks to put load on that a step tries at first: so many, or as hold so many slots
MAX_COOL = 24  # ranks that it looks at when those offer nothing: up to a quarter of all, or so many
RECURRING_LASTS = 8.0  # windows that moves for kinds of load that come back serve, as those for batches do
NO_LIMIT = 1 << 60


def solve(problem: PlacementProblem) -> Solution:
    """Solves placement and dispatch weights together.

    Raises:
        ConfigError: ``max_moves_per_layer`` leaves too few moves to keep the experts of ranks that are gone, or a node
            has too few live slots for its expert groups.
    """
    task = Task.of(problem)
    if problem.current is None:
        return task.finish(*_plan(task))
    placed, share = task.old.copy(), task.old_share.copy()
    worth = what_is_worth_a_search(task)
    searched, weighed = np.flatnonzero(worth.moves), np.flatnonzero(worth.shares & ~worth.moves)
    if searched.size:
        placed[searched], share[searched] = _plan(task.take(searched))
    if weighed.size and problem.dispatch == "weights":
        share[weighed] = better_shares(task.take(weighed))
    return task.finish(placed, share)


def _plan(task: Task) -> Plan:
    """Experts and shares of a task's layers, as :func:`solve`."""
    problem = task.problem
    value = np.full(len(task.old), -np.inf)
    placed, share = task.old.copy(), task.old_share.copy()
    if problem.current is not None:
        _improve(task, placed, share, value)
    for flatness in range(NUM_FLATNESS if problem.dispatch == "even" else 1):
        _improve_packed(task, placed, share, value, flatness)
    if problem.dispatch == "even" and problem.current is None and (task.layers.inverse_speed == 1.0).all():
        _improve_published(task, placed, share, value)
    if (value == -np.inf).any():
        lost = int(np.flatnonzero(value == -np.inf)[0])
        raise ConfigError(
            f"rank_capacity leaves experts of layer {lost} without a live rank, and max_moves_per_layer="
            f"{problem.max_moves_per_layer}, num_groups={problem.num_groups} leave no slot to copy them to",
            field="rank_capacity",
        )
    if problem.dispatch == "batch" and not task.num_groups:
        planned = plan_for_batches(task, placed, _move_terms(task, problem.move_price))
        return planned, solve_shares(task.at(planned))
    if problem.current is not None:
        placed, share = keep_what_is_better(task, *_with_old_slots(task), (placed, share))
    return placed, share


def _improve_packed(task: Task, placed: np.ndarray, share: np.ndarray, value: np.ndarray, flatness: int) -> None:
    """Searches from a packing from scratch as well, in place; taken where it is worth more than ``value`` (L,)."""
    problem = task.problem
    # A packing from scratch moves more than half of the slots: below, it could win nevertheless.
    retried = np.flatnonzero(value < (1.0 if problem.current is None else 1.0 - 0.5 * _price_of_moves(task)))
    if not retried.size:
        return
    part = task.take(retried)
    fresh, enough = pack_from_scratch(part, flatness)
    if problem.current is not None:
        _rename_ranks(part, fresh, enough, value[retried])
    fresh_share, fresh_value = np.zeros_like(part.old_share), np.where(enough, value[retried], np.inf)
    _improve(part, fresh, fresh_share, fresh_value)
    better = enough & (fresh_value > value[retried])
    chosen = retried[better]
    placed[chosen], share[chosen], value[chosen] = fresh[better], fresh_share[better], fresh_value[better]


def _rename_ranks(task: Task, fresh: np.ndarray, enough: np.ndarray, to_beat: np.ndarray) -> None:
    """Names the ranks of the packing ``fresh`` (L, P) after those in force, in place.

    ``enough`` (L,) becomes False where its moves cost more than perfect balance is worth over ``to_beat`` (L,).
    """
    problem, slot_price = task.problem, _price_of_moves(task) / task.problem.topology.num_slots
    for layer in np.flatnonzero(enough):
        renamed = relabel(
            fresh[layer],
            task.old[layer],
            problem.topology.num_nodes,
            task.layers.inverse_speed,
            NODE_PRICE,
            problem.grouped,
            (1.0 - to_beat[layer]) / slot_price if slot_price else np.inf,
        )
        enough[layer] = renamed is not None
        if renamed is not None:
            fresh[layer] = renamed


def _improve_published(task: Task, placed: np.ndarray, share: np.ndarray, value: np.ndarray) -> None:
    """Searches from the published planner's plan as well, in place: where replicas share alike it is a good start."""
    problem = task.problem
    solve_published = deepseek.solve_hierarchical if problem.grouped else deepseek.solve_global
    other = solve_published(problem).physical_to_logical_map
    other_share, other_value = np.zeros_like(share), value.copy()
    _improve(task, other, other_share, other_value)
    better = other_value > value
    placed[better], share[better], value[better] = other[better], other_share[better], other_value[better]


def _with_old_slots(task: Task) -> list[tuple[np.ndarray, np.ndarray]]:
    """The placement in force with new shares; nothing where ranks are gone, whose experts are to be kept alive."""
    fixed = task.problem.dispatch != "weights" or (task.layers.inverse_speed == 0).any()
    return [] if fixed else [(task.old, solve_shares(task))]


def compile_search(problem: PlacementProblem) -> None:
    """Compiles the search and nothing else; the values of ``problem`` do not matter, and no scenarios are made."""
    shape = (problem.num_layers, problem.num_logical_experts)
    any_load = np.ones(problem.num_layers, dtype=np.bool_)
    even, none = np.full(NUM_SCENARIOS, 0.25), np.zeros(shape)
    flat = Scenarios(
        np.ones((*shape, NUM_SCENARIOS)),
        even,
        none,
        none,
        any_load,
        1.0,
        mixture=False,
        recurring=False,
        steady=False,
        unsure=False,
    )
    task = Task.of(problem, flat)
    _improve(task, task.old, task.old_share, np.full(problem.num_layers, -np.inf))


def compile_packing(problem: PlacementProblem) -> None:
    """Compiles the packing from scratch and its names, scenarios, plans for batches and the guard, not the search."""
    task = Task.of(problem)
    pack_from_scratch(task, 0)
    compile_relabelling()
    plan_for_batches(task, task.old, _move_terms(task, problem.move_price))
    keep_what_is_better(task, (task.old, task.old_share))


def _improve(task: Task, placed: np.ndarray, share: np.ndarray, value: np.ndarray) -> None:
    """Searches each layer from ``placed`` for a plan worth more than ``value``, in place; ``value`` becomes its."""
    problem, from_nothing = task.problem, task.problem.current is None
    topology = problem.topology
    several = task.noise_is_known if not from_nothing else problem.load.shape[0] > 1
    moves = _move_terms(task, _price_of_moves(task))
    num_cool = max(NUM_COOL, COOL_SLOTS // topology.slots_per_rank)
    options = SearchOptions(
        np.array(STAGES if several else SINGLE_STAGES),
        # From nothing, with several windows to please, a few steps bring what carries over to the next window.
        max(24, topology.num_ranks // 2) if from_nothing and several else topology.num_slots,
        MIN_GAIN if several or not from_nothing else SINGLE_MIN_GAIN,
        num_cool,
        max(num_cool, min(MAX_COOL, topology.num_ranks // 4) if several or not from_nothing else MAX_COOL),
        problem.dispatch == "even",
        topology.ranks_per_node if task.num_groups else topology.num_ranks,
    )
    task.run(_improve_layers, task.old, placed, share, value, task.layers, moves, options)


def _price_of_moves(task: Task) -> float:
    """Balance that moving all of a layer's slots within their nodes must gain: less where it serves for long."""
    return task.problem.move_price / (RECURRING_LASTS if task.scenarios.recurring else 1.0)


def _move_terms(task: Task, move_price: float) -> MoveTerms:
    problem, limit = task.problem, task.problem.max_moves_per_layer
    unlimited = limit is None or problem.current is None
    return MoveTerms(task.prices, move_price / problem.topology.num_slots, NO_LIMIT if unlimited else int(limit or 0))


@kernel
def _improve_layers(
    first: int,
    last: int,
    old: np.ndarray,
    placed: np.ndarray,
    share: np.ndarray,
    value: np.ndarray,
    layers: Layers,
    moves: MoveTerms,
    options: SearchOptions,
) -> None:
    """Repairs and searches rows first..last-1 of ``placed`` and ``share`` (L, P), in place.

    ``value`` (L,) holds what a layer has to beat and takes what it reached: -inf where no valid plan is within the
    limit, or none that could beat it.
    """
    experts, inverse_speed = layers.experts, layers.inverse_speed
    ranks_per_node, num_groups = layers.ranks_per_node, layers.num_groups
    prices, slot_price, limit = moves
    num_ranks, num_experts = inverse_speed.shape[0], experts.shape[1]
    for layer in range(first, last):
        to_beat = value[layer]
        value[layer] = -np.inf
        origin = origins_of(old[layer], num_experts, num_ranks, ranks_per_node)
        home, whole = home_of_experts(placed[layer], num_groups, num_ranks // ranks_per_node, num_experts)
        state = new_state(placed[layer], share[layer], experts[layer], layers.weight, inverse_speed)
        made = restore_lost_experts(state, home, ranks_per_node)
        if made < 0 or not (whole or limit < NO_LIMIT):
            continue
        split_colocated(state, origin, home, ranks_per_node, limit - made)
        if options.even:
            split_evenly(state)
        else:
            spread_shares(state)
        price, made = spent(state.expert, origin, prices)
        if made > limit or 1.0 - slot_price * price <= to_beat:
            continue
        if layers.any_load[layer] or prices[ELSEWHERE] == 0.0:
            value[layer] = search(state, origin, moves, options)
        else:
            value[layer] = 1.0  # no token was seen: nothing speaks for a change
