"""Improves placements layer by layer: repairs them, then searches for moves and shares that pay.

The moves that pay are those whose gain in balance exceeds their price (search/local_search.py); repairs are what a
placement needs to be valid at all, whatever they cost.
"""

from __future__ import annotations

import numpy as np

from equipoise.algorithms.search.even_split import split_evenly
from equipoise.algorithms.search.layer_state import new_state
from equipoise.algorithms.search.local_search import SearchOptions, search
from equipoise.algorithms.search.move_price import ELSEWHERE, MoveTerms, origins_of, spent
from equipoise.algorithms.search.repair import home_of_experts, restore_lost_experts, split_colocated, spread_shares
from equipoise.algorithms.task import FEW_WINDOWS, Layers, Task
from equipoise.jit.compile import kernel
from equipoise.topology import EpTopology

STAGES = (2, 3, 5)  # exponents of the power-sum surrogate: 2**2 = 4, then 8, then 32
SINGLE_STAGES = (3, 6)  # the same where there is one window
SHORT = 1  # stages, the smoothest ones, that a short search leaves out
MIN_GAIN = 4e-3  # of the cost, that a step has to bring even when moves are free
SINGLE_MIN_GAIN = 2e-4  # the same where there is one window, and nothing but that window to fit
NUM_COOL, COOL_SLOTS = 5, 36  # ranks to put load on that a step tries at first: so many, or as hold so many slots
CROWD, THRONG = 64, 256  # ranks, of which more are as cool as the coolest: no more of them than make CROWD_PAIRS
CROWD_PAIRS, CROWD_COOL = 108, 4  # pairs of slots with a hot rank, in a throng half of that, but at least CROWD_COOL
MAX_COOL = 24  # ranks that it looks at when those offer nothing: up to a quarter of all, or so many
PAIR = 2  # slots a rank, up to which moves cost less: a part of their price
PRICE_OF_PAIRS, PRICE_OF_PAIRS_AT_FIRST = 1 / 3, 0.6  # with a long history; with few windows, but more than one
LASTS = 8.0  # windows served by moves that do not hang on one forecast: for load that comes back, and for batches
NO_LIMIT = 1 << 60


def improve(task: Task, placed: np.ndarray, share: np.ndarray, value: np.ndarray, *, is_short: bool = False) -> None:
    """Searches each layer from ``placed`` for a plan worth more than ``value``, in place; ``value`` becomes its."""
    problem, from_nothing = task.problem, task.problem.current is None
    topology = problem.topology
    several = task.noise_is_known if not from_nothing else problem.load.shape[0] > 1
    moves = move_terms(task, price_of_moves(task))
    num_cool = _num_cool(topology)
    options = SearchOptions(
        np.array((STAGES if several else SINGLE_STAGES)[SHORT if is_short else 0 :]),
        # From nothing, with several windows to please, a few steps bring what carries over to the next window.
        max(24, topology.num_ranks // 2) if from_nothing and several else topology.num_slots,
        MIN_GAIN if several or not from_nothing else SINGLE_MIN_GAIN,
        num_cool,
        max(num_cool, min(MAX_COOL, topology.num_ranks // 4) if several or not from_nothing else MAX_COOL),
        problem.dispatch == "even",
        topology.ranks_per_node if task.num_groups else topology.num_ranks,
    )
    task.run(_improve_layers, task.old, placed, share, value, task.layers, moves, options)


def _num_cool(topology: EpTopology) -> int:
    """Ranks to put load on that a step of the search tries at first."""
    size = topology.slots_per_rank
    if topology.num_ranks < CROWD:
        return max(NUM_COOL, COOL_SLOTS // size)
    pairs = CROWD_PAIRS if topology.num_ranks < THRONG else CROWD_PAIRS // 2
    return max(CROWD_COOL, min(COOL_SLOTS // size, pairs // size**2))


def price_of_moves(task: Task) -> float:
    """Balance that moving all of a layer's slots within their nodes must gain.

    Less where it serves for long. Less, too, where ranks hold two slots: a move is half of what such a rank holds, a
    ninth of nine slots, so to level as many ranks takes several times as many moves. A short history is trusted less.
    """
    problem, num_windows = task.problem, len(task.problem.load)
    price = problem.move_price
    if problem.topology.slots_per_rank <= PAIR and num_windows > 1:
        price *= PRICE_OF_PAIRS if num_windows > FEW_WINDOWS else PRICE_OF_PAIRS_AT_FIRST
    return price / (LASTS if task.scenarios.recurring else 1.0)


def move_terms(task: Task, move_price: float) -> MoveTerms:
    """Prices and the limit of moves, as the kernels take them, where moving a whole layer must gain ``move_price``."""
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
