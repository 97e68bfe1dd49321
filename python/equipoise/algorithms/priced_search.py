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
from equipoise.algorithms.guard import (
    Plan,
    keep_what_is_better,
    may_gain_by_shares,
    what_is_worth_a_search,
)
from equipoise.algorithms.improve import improve, move_terms, price_of_moves
from equipoise.algorithms.packing import NUM_FLATNESS, pack_from_scratch
from equipoise.algorithms.problem import PlacementProblem, Solution
from equipoise.algorithms.reweight import solve_shares
from equipoise.algorithms.task import NODE_PRICE, Task
from equipoise.errors import ConfigError
from equipoise.placement.relabel import compile_relabelling, relabel


def solve(problem: PlacementProblem) -> Solution:
    """Solves placement and dispatch weights together.

    Raises:
        ConfigError: ``max_moves_per_layer`` leaves too few moves to keep the experts of ranks that are gone, or a node
            has too few live slots for its expert groups.
    """
    task = Task.of(problem)
    if problem.current is None:
        return task.finish(*_plan(task))
    worth = what_is_worth_a_search(task)
    placed, share = task.old.copy(), task.old_share.copy()
    searched = np.flatnonzero(worth.moves)
    if searched.size:
        placed[searched], share[searched] = _plan(task.take(searched))
    if task.for_batches:
        return task.finish(placed, share)
    kept, kept_share = task.old.copy(), task.old_share.copy()
    judged = np.flatnonzero((placed != task.old).any(1) | worth.shares)
    if judged.size:
        part = task.take(judged)
        plans = [*_with_old_slots(part), (placed[judged], share[judged])]
        kept[judged], kept_share[judged] = keep_what_is_better(part, *plans)
    return task.finish(kept, kept_share)


def _plan(task: Task) -> Plan:
    """Experts and shares of a task's layers, whatever those in force are worth."""
    problem = task.problem
    value = np.full(len(task.old), -np.inf)
    placed, share = task.old.copy(), task.old_share.copy()
    if problem.current is not None:
        _improve_in_force(task, placed, share, value)
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
    if task.for_batches:
        planned = plan_for_batches(task, placed, move_terms(task, problem.move_price))
        return planned, solve_shares(task.at(planned))
    return placed, share


def _improve_in_force(task: Task, placed: np.ndarray, share: np.ndarray, value: np.ndarray) -> None:
    """Searches from the placement in force, in place.

    Where load has been steady for long and most layers are searched all the same, as with two slots a rank that cannot
    be made level, most hold nothing that pays: a short search tells, and only what it would move is searched in full.
    """
    chosen = np.arange(len(placed))
    if task.steady_for_long and 2 * len(placed) > task.problem.num_layers:
        improve(task, placed, share, value, is_short=True)
        chosen = np.flatnonzero((placed != task.old).any(1) | (value == -np.inf))
        if not chosen.size:
            return
    part = task.take(chosen)
    found, found_share, found_value = part.old.copy(), part.old_share.copy(), np.full(len(chosen), -np.inf)
    improve(part, found, found_share, found_value)
    placed[chosen], share[chosen], value[chosen] = found, found_share, found_value


def _improve_packed(task: Task, placed: np.ndarray, share: np.ndarray, value: np.ndarray, flatness: int) -> None:
    """Searches from a packing from scratch as well, in place; taken where it is worth more than ``value`` (L,)."""
    problem = task.problem
    limit = 1.0
    if problem.current is not None:
        # A packing from scratch moves more than half of the slots, to any node: below, it could win nevertheless.
        elsewhere = 1.0 - 1.0 / problem.topology.num_nodes
        limit -= 0.5 * price_of_moves(task) * (1.0 + (NODE_PRICE - 1.0) * elsewhere)
    retry = value < limit
    if problem.current is not None and task.steady_for_long:
        # Where there is nothing to do for a search from the placement in force, packings were tried in vain before.
        retry &= (placed != task.old).any(1) | (value == -np.inf)
    retried = np.flatnonzero(retry)
    if not retried.size:
        return
    part = task.take(retried)
    fresh, enough = pack_from_scratch(part, flatness)
    if problem.current is not None:
        _rename_ranks(part, fresh, enough, value[retried])
    fresh_share, fresh_value = np.zeros_like(part.old_share), np.where(enough, value[retried], np.inf)
    improve(part, fresh, fresh_share, fresh_value)
    better = enough & (fresh_value > value[retried])
    chosen = retried[better]
    placed[chosen], share[chosen], value[chosen] = fresh[better], fresh_share[better], fresh_value[better]


def _rename_ranks(task: Task, fresh: np.ndarray, enough: np.ndarray, to_beat: np.ndarray) -> None:
    """Names the ranks of the packing ``fresh`` (L, P) after those in force, in place.

    ``enough`` (L,) becomes False where its moves cost more than perfect balance is worth over ``to_beat`` (L,).
    """
    problem, slot_price = task.problem, price_of_moves(task) / task.problem.topology.num_slots
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
    improve(task, other, other_share, other_value)
    better = other_value > value
    placed[better], share[better], value[better] = other[better], other_share[better], other_value[better]


def _with_old_slots(task: Task) -> list[tuple[np.ndarray, np.ndarray]]:
    """The placement in force with new shares; nothing where ranks are gone, whose experts are to be kept alive."""
    fixed = task.problem.dispatch != "weights" or (task.layers.inverse_speed == 0).any()
    return [] if fixed else [(task.old, solve_shares(task))]


def compile_search(problem: PlacementProblem) -> None:
    """Compiles the search and :func:`solve_shares`; values of ``problem`` do not matter, and no scenarios are made."""
    shape = (problem.num_layers, problem.num_logical_experts)
    any_load = np.ones(problem.num_layers, dtype=np.bool_)
    even, none, ones = np.full(NUM_SCENARIOS, 0.25), np.zeros(shape), np.ones((*shape, NUM_SCENARIOS))
    flat = Scenarios(
        ones,
        even,
        none,
        none,
        ones[..., 0],
        any_load,
        1.0,
        mixture=False,
        recurring=False,
        steady=False,
        unsure=False,
        two_kinds=False,
    )
    task = Task.of(problem, flat)
    improve(task, task.old, task.old_share, np.full(problem.num_layers, -np.inf))
    solve_shares(task)


def compile_packing(problem: PlacementProblem) -> None:
    """Compiles the packing from scratch and its names, scenarios, the guard and what finishes a plan, no search."""
    task = Task.of(problem)
    pack_from_scratch(task, 0)
    compile_relabelling()
    keep_what_is_better(task, (task.old, task.old_share))
    may_gain_by_shares(task)
    task.finish(task.old, task.old_share)


def compile_for_batches(problem: PlacementProblem) -> None:
    """Compiles the search for dispatch by the batch."""
    task = Task.of(problem)
    plan_for_batches(task, task.old, move_terms(task, problem.move_price))
