"""The search's step against a brute force in numpy that tries every overwrite and every exchange of a small layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numba
import numpy as np
import pytest

from equipoise.algorithms.search.best_change import FREE, Change, best_change
from equipoise.algorithms.search.change_bounds import bounds, candidates, new_scratch
from equipoise.algorithms.search.changes import overwrite_gain, slot_loads, swap_gain
from equipoise.algorithms.search.even_split import even_overwrite_gain
from equipoise.algorithms.search.layer_state import new_state, refresh
from equipoise.algorithms.search.move_price import ON_RANK
from equipoise.jit.compile import number
from helpers.numpy_layer import (
    EXPERTS,
    RANKS,
    SIZE,
    SLOTS,
    Layer,
    first_part_gains,
    leave_to,
    marginal,
    may_overwrite,
    on_rank,
    slot_pairs,
)

PRICES = np.array([0.0, 1.0, 2.5])


@dataclass(frozen=True)
class Kernels:
    """What the kernels say of each slot k of a cool rank, each pair of ranks, and each pair of slots."""

    change: Change
    remaining: np.ndarray  # (P,)
    freed: np.ndarray  # (P,)
    back: np.ndarray  # (hot rank, P)
    limit: np.ndarray  # (hot rank, P)
    any_swap: np.ndarray  # (hot rank, cool rank)
    overwrite: np.ndarray  # (hot slot, cool slot) exact gain
    part: np.ndarray  # (hot slot, cool slot)
    swap: np.ndarray  # (hot slot, cool slot) exact gain


@numba.njit(error_model="numpy")  # not cached: numba's cache would not see that a helper has changed
def _ask_kernels(layer, even, doublings, origin, prices, room, min_rate, hot, cool, out):  # type: ignore[no-untyped-def]
    expert, share, experts, weight, slow = layer
    remaining, freed, back, limit, any_swap, overwrites, part, swaps = out
    state = new_state(expert, share, experts, weight, slow)
    num_ranks = slow.shape[0]
    size = expert.shape[0] // num_ranks
    for rank in range(num_ranks):
        refresh(state.ranks, weight, rank, doublings)
    scratch = new_scratch(size)
    hot_loads, cool_loads, saved = scratch.loads[0], scratch.loads[-2], scratch.loads[-1]
    for c in range(num_ranks):
        candidates(state, c, origin, prices, scratch, even)
        remaining[c * size : (c + 1) * size] = scratch.remaining
        freed[c * size : (c + 1) * size] = scratch.freed
        for h in range(num_ranks):
            if h == c:
                continue
            any_swap[h, c] = bounds(state, h, c, doublings, scratch, even)[1]
            back[h, c * size : (c + 1) * size] = scratch.back
            limit[h, c * size : (c + 1) * size] = scratch.limit
            slot_loads(expert, share, experts, h, size, hot_loads)
            for i in range(size):
                for j in range(size):
                    p, k = h * size + i, c * size + j
                    swaps[p, k] = swap_gain(state.ranks, weight, hot_loads, i, h, cool_loads, j, c, doublings)
                    if remaining[k] >= 0 and state.held[c, expert[p]] == 0:
                        if even:
                            overwrites[p, k] = even_overwrite_gain(state, k, expert[p], doublings)
                        else:
                            overwrites[p, k], part[p, k] = overwrite_gain(state, p, k, remaining[k], doublings, saved)
    return best_change(state, hot, cool, origin, prices, number(room), doublings, min_rate, scratch, even)


def ask_kernels(layer: Layer, even: bool, doublings: int, origin: np.ndarray, room: int, min_rate: float) -> Kernels:
    experts = np.concatenate([layer.tokens, layer.noise[:, None]], axis=1)
    arrays = (layer.expert.copy(), layer.share.copy(), experts, layer.weight, layer.slow)
    by_pair = [np.full((SLOTS, SLOTS), np.nan) for _ in range(3)]
    by_rank = [np.full((RANKS, SLOTS), np.nan) for _ in range(2)]
    out = (np.zeros(SLOTS, np.int64), np.zeros(SLOTS), *by_rank, np.full((RANKS, RANKS), np.nan), *by_pair)
    hot, cool = hot_and_cool(layer, 1 << doublings)
    return Kernels(
        _ask_kernels(arrays, even, doublings, origin, PRICES, room, min_rate, hot, cool, out),
        *out,
    )


def hot_and_cool(layer: Layer, q: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(layer.cost(q))
    return order[-2:][::-1].copy(), order[:3].copy()


def brute_force(layer: Layer, even: bool, q: int, origin: np.ndarray, room: int, said: Kernels) -> float:
    """The best rate, gain per price, of all changes; overwrites take the part that the kernel solved for."""
    best, cost = 0.0, layer.cost(q)
    hot, cool = hot_and_cool(layer, q)
    for p, h, k, c in slot_pairs():
        new, old = layer.expert[p], layer.expert[k]
        if h not in hot or c not in cool or cost[h] <= cost[c] or new in on_rank(layer, c):
            continue
        price = PRICES[origin[c, new]] - PRICES[origin[c, old]]
        moves = int(origin[c, new] != ON_RANK) - int(origin[c, old] != ON_RANK)
        if may_overwrite(layer, p, k) and moves <= room and first_part_gains(layer, even, q, p, c):
            changed = layer.overwrite_evenly(p, k) if even else overwritten(layer, p, k, said)
            if even or said.part[p, k] > 0.0:
                best = max(best, layer.gain(changed, q) / max(price, FREE))
        if old not in on_rank(layer, h):
            price += PRICES[origin[h, old]] - PRICES[origin[h, new]]
            moves += int(origin[h, old] != ON_RANK) - int(origin[h, new] != ON_RANK)
            if moves <= room:
                best = max(best, layer.gain(layer.swap(p, k), q) / max(price, FREE))
    return best


def overwritten(layer: Layer, p: int, k: int, said: Kernels) -> Layer:
    return layer.overwrite(p, k, int(said.remaining[k]), float(said.part[p, k]))


def case(seed: int, even: bool, noisy: bool, uneven: bool, room: int = 99) -> tuple[Layer, int, np.ndarray, Kernels]:
    layer = Layer.draw(seed, even=even, noisy=noisy, uneven=uneven)
    doublings = 2 + seed % 3
    origin = np.random.default_rng([seed, 1]).integers(0, 3, (RANKS, EXPERTS)).astype(np.uint8)
    return layer, 1 << doublings, origin, ask_kernels(layer, even, doublings, origin, room, 0.0)


both = pytest.mark.parametrize("even", [False, True], ids=["weights", "even"])
kinds = pytest.mark.parametrize(("noisy", "uneven"), [(False, False), (True, False), (True, True)])
seeds = pytest.mark.parametrize("seed", range(6))


@both
@kinds
@seeds
def test_exact_gains_are_those_of_the_definition(seed: int, even: bool, noisy: bool, uneven: bool) -> None:
    layer, q, _, said = case(seed, even, noisy, uneven)
    scale = layer.cost(q).sum()
    for p, _, k, _ in slot_pairs():
        assert said.swap[p, k] == pytest.approx(layer.gain(layer.swap(p, k), q), rel=1e-10, abs=1e-11 * scale)
        if may_overwrite(layer, p, k):
            changed = layer.overwrite_evenly(p, k) if even else overwritten(layer, p, k, said)
            assert said.overwrite[p, k] == pytest.approx(layer.gain(changed, q), rel=1e-10, abs=1e-11 * scale)


@both
@kinds
@seeds
def test_no_change_gains_more_than_its_bounds(seed: int, even: bool, noisy: bool, uneven: bool) -> None:
    layer, q, _, said = case(seed, even, noisy, uneven)
    loads, slope = layer.slot_loads(), layer.slope(q)
    room = 1e-11 * layer.cost(q).sum()
    for p, h, k, c in slot_pairs():
        swapped = layer.gain(layer.swap(p, k), q)
        out = ((slope[h] - slope[c]) * loads[p]).sum()
        assert swapped <= q * (out + said.back[h, k]) + room
        assert uneven or swapped <= said.any_swap[h, c] + room
        if not may_overwrite(layer, p, k):
            continue
        if even:
            lost = layer.gain(layer.overwrite_evenly(p, k), q)
            n, e = len(layer.replicas(layer.expert[p])) + 1, layer.expert[p]
            fewer = replace(layer, share=np.where(layer.expert == e, 1.0 / n, layer.share))
            less = (loads - fewer.slot_loads()).reshape(RANKS, SIZE, -1).sum(1)
            rate = (slope * less).sum() - (slope[c] * (layer.tokens[e] / n + layer.noise[e] / n**2)).sum()
        else:
            e, has = layer.expert[p], layer.share[p]
            parts = np.linspace(0.0, has, 33)  # whatever part it takes
            lost = max(layer.gain(layer.overwrite(p, k, int(said.remaining[k]), part), q) for part in parts)
            rate = has * (marginal(layer, q, h, e, has) - marginal(layer, q, c, e, 0.0))
            relief = 0.5 * slope[h].sum() * layer.noise[e] * has**2
            assert uneven or lost <= said.limit[h, k] + q * relief + room
        # A part that gains nothing at first is not taken; the bound of any part is that of the first, times all.
        assert lost <= q * (max(rate, 0.0) + said.freed[k]) + room


@both
@seeds
def test_candidates_leave_their_share_where_it_costs_least(seed: int, even: bool) -> None:
    layer, q, _, said = case(seed, even, noisy=True, uneven=True)
    slope, loads = layer.slope(q), layer.slot_loads()
    for k in range(SLOTS):
        others = [slot for slot in layer.replicas(layer.expert[k]) if slot != k]
        if not others:
            assert said.remaining[k] == -1
        elif not even:
            costs = [leave_to(layer, q, k, other) for other in others]
            assert said.remaining[k] == others[int(np.argmin(costs))]
            assert said.freed[k] == pytest.approx((slope[k // SIZE] * loads[k]).sum() - min(costs))
        else:
            left = replace(layer, share=np.where(layer.expert == layer.expert[k], 1.0 / len(others), layer.share))
            more = np.where(np.arange(SLOTS) == k, 0.0, 1.0)[:, None] * left.slot_loads() - loads
            assert said.freed[k] == pytest.approx(-(np.repeat(slope, SIZE, axis=0) * more).sum())


@both
@pytest.mark.parametrize("room", [0, 1, 99])
@pytest.mark.parametrize("seed", range(20))
def test_the_best_change_is_that_of_the_brute_force(seed: int, room: int, even: bool) -> None:
    """Of ranks of one speed: there the bounds hold, and no better change is dismissed."""
    layer, q, origin, said = case(seed, even, noisy=seed % 2 == 1, uneven=False, room=room)
    best = brute_force(layer, even, q, origin, room, said)
    assert said.change.rate == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert (said.change.slot_1 >= 0) == (best > 0.0)


@seeds
def test_an_overwrite_takes_about_the_best_part(seed: int) -> None:
    """Newton's method is stopped after two rounds: the search ranks changes by it, and solves the shares afterwards."""
    layer, q, _, said = case(seed, even=False, noisy=True, uneven=True)
    best, reached = 0.0, 0.0
    for p, _, k, _ in slot_pairs():
        if may_overwrite(layer, p, k):
            gains = [
                layer.gain(layer.overwrite(p, k, int(said.remaining[k]), part), q)
                for part in np.linspace(0.0, layer.share[p], 65)
            ]
            best, reached = best + max(*gains, 0.0), reached + max(said.overwrite[p, k], 0.0)
    assert reached > 0.8 * best
