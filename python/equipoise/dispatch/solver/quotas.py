"""Solves the quotas of a layer's replicas from its counts: the reference in torch, in integers alone.

The shares that minimise the sum of squared rank loads also minimise the largest load (a flow in a bipartite graph), and
for one expert alone that minimum is a water-fill over its ranks. So::

    start    the planned shares
    repeat   all rows at once: bids b = load / D - x, then x = water-fill of the row's tokens over b   (block Jacobi)
             D = (1 + most rows on any of the row's ranks) / 2; iterates are extrapolated (momentum); the one with the
             least largest load is kept, so the result is never worse than the planned shares
    round    running sums of a row, down, from a phase that differs by scope, row and step: sums stay exact
    sweep    coordinate descent in whole tokens, colour by colour: rows of one colour share no rank

Every step is a few sums over ranks whatever the number of experts. Loads are fixed-point int32 (at most 10 fraction
bits, so many that nothing overflows); divisions inside the repeated part are multiplications by reciprocals, and the
units that they lose come back before rounding. ``solve_numba.py`` and ``kernels.py`` compute the same bits.

An activated expert costs its rank ``active_cost`` tokens beside those it computes. So a row opens about
``tokens / active_cost`` replicas, the primary first; where all tokens are known it then chooses again, in turns,
those whose ranks have the least load. Other scopes' tokens activate as well: where they are not seen, all scopes must
open alike, so a row counts as many tokens as it has on average for its number of replicas, and what is open as
activated. All replicas open where that leaves the busiest rank with less. The rest is solved over what is open.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from equipoise.dispatch.solver import controls as control
from equipoise.dispatch.solver.open_numba import RECHOICES, UNSEEN_SHIFT
from equipoise.dispatch.solver.solve_numba import (
    EXPERT_STRIDE,
    MAX_FRACTION_BITS,
    MOMENTUM,
    PHASE_BITS,
    PHASE_MASK,
    SCOPE_STRIDE,
)
from equipoise.dispatch.solver.table_builder import (
    MAX_ACTIVE,
    MAX_UNITS,
    NUM_COLOURS,
    NUM_RANKS,
    NUM_REPLICAS,
    WEIGHT_BITS,
    TableArrays,
)

_LARGE = 1 << 30


def rounding_phase(num_rows: int, rotation: int) -> torch.Tensor:
    """(M,) int64, where each row's rounding begins, in 65536ths of a token."""
    return (torch.arange(num_rows) * EXPERT_STRIDE + rotation * SCOPE_STRIDE) & PHASE_MASK


def solve_quotas(counts: torch.Tensor, tables: TableArrays[torch.Tensor], controls: torch.Tensor) -> torch.Tensor:
    """Tokens for each replica.

    Args:
        counts: (E,) integers, the tokens of a scope.
        tables: of one layer, ``DispatchTables.layer``.
        controls: (NUM_CONTROLS,) int32, ``DispatchPolicy.controls``.

    Returns:
        (M, C) int32, each row sums to its expert's count.
    """
    return _Layer(counts, tables, controls.tolist()).solve()


@dataclass(frozen=True)
class _Fill:
    """A water-fill of every row: level (M, 1) and bids (M, C), shifted so that a row's least is 0."""

    level: torch.Tensor
    bids: torch.Tensor
    x: torch.Tensor


class _Layer:
    def __init__(self, counts: torch.Tensor, tables: TableArrays[torch.Tensor], controls: list[int]) -> None:
        self.tables = tables
        self.controls = controls
        self.sizes = self.tables.sizes.tolist()
        counts = counts.to(torch.int32)
        real = self.tables.expert >= 0
        self.tokens = torch.where(real, counts[self.tables.expert.clamp(min=0).long()], 0)[:, None]
        self.is_choice = self.tables.rank >= 0
        self.rank = self.tables.rank.clamp(min=0).long()
        self.rotated = self._rotated_places()
        single = self.tables.rank_of_single
        on_rank = single.clamp(min=0).long()
        empty = torch.zeros(self.sizes[NUM_RANKS], dtype=torch.int32)
        self.base = empty.index_add(0, on_rank, torch.where(single >= 0, counts, 0))
        self.sees_all = controls[control.SEES_ALL] > 0
        self.active = empty.index_add(
            0, on_rank, ((single >= 0) & ((counts > 0) | (not self.sees_all))).to(torch.int32)
        )
        self.total = int(counts.sum())

    def solve(self) -> torch.Tensor:
        controls, most = self.controls, self.sizes[MAX_UNITS]
        room = 16 * max(most - self.total, 0) // self.sizes[MAX_ACTIVE]
        self.cost = min(controls[control.ACTIVE_COST], 16 * self.total, room)
        reach = self.total + ((self.cost * self.sizes[MAX_ACTIVE]) >> 4)
        self.bits = sum(reach <= most >> bits for bits in range(1, MAX_FRACTION_BITS + 1))
        self.is_open = self._open_replicas()
        base = (self.base << self.bits) + self.active * self._units
        far = torch.zeros_like(base)
        ranks = torch.arange(len(base))
        away = (ranks < controls[control.HOME_FIRST]) | (ranks >= controls[control.HOME_LAST])
        mean = (self.total << self.bits) // len(base)
        far[away] = min((mean * controls[control.CROSS_COST]) >> 16, self.total << self.bits)
        quotas = self._round(self._descend(base, far))
        if self.total >= controls[control.MIN_SWEEP_TOKENS]:
            for _ in range(controls[control.SWEEPS]):
                for colour in range(self.sizes[NUM_COLOURS]):
                    mine = (self.tables.colour == colour)[:, None]
                    load = self._load(quotas, base >> self.bits) + (far >> self.bits)
                    filled = self._fill(load[self.rank] - quotas, self.tokens, exact=True)
                    quotas = torch.where(mine, self._give_rest(filled), quotas)
        return quotas

    @property
    def _units(self) -> int:
        """Cost of an activated expert in fixed point."""
        return (self.cost << self.bits) >> 4

    def _rotated_places(self) -> torch.Tensor:
        """(M, C) place of each choice in the order in which its row gives what is left over."""
        rows, width = self.rank.shape
        size = self.tables.num_choices.clamp(min=1)[:, None]
        return (torch.arange(width) + torch.arange(rows)[:, None] + self.controls[control.ROTATION]) % size

    def _load(self, x: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        return base.index_add(0, self.rank.flatten(), torch.where(self.is_choice, x, 0).flatten())

    def _open_replicas(self) -> torch.Tensor:
        """(M, C) bool; what is open counts in ``active`` from now on."""
        size, units = self.tables.num_choices[:, None], self._units
        if not units:
            return self.is_choice
        if self.sees_all:
            part, base = self.tokens << self.bits, self.base << self.bits
        else:
            usual = (self.total << self.bits) // self.sizes[NUM_REPLICAS]
            part, base = usual * size, usual * self.active
        base = base + self.active * units
        num_open = ((part + units // 2) // units).clamp(min=1).minimum(size)
        is_open = torch.arange(self.rank.shape[1]) < num_open
        if self.sees_all:
            is_open = self._open_least(is_open, num_open, _each(part, num_open, units), base)
        load = self._load(torch.where(is_open, _each(part, num_open, units), 0), base)
        with_all = self._load(_each(part, size, units).expand_as(is_open), base)
        if int(with_all.max()) + (0 if self.sees_all else units >> UNSEEN_SHIFT) < int(load.max()):
            is_open = self.is_choice
        self.active = self._load((is_open & (part > 0)).to(torch.int32), self.active)
        return is_open

    def _open_least(
        self, is_open: torch.Tensor, num_open: torch.Tensor, each: torch.Tensor, base: torch.Tensor
    ) -> torch.Tensor:
        """(M, C) bool, ``num_open`` of each row again: those whose ranks have the least load, colour by colour."""
        for _ in range(RECHOICES):
            for colour in range(self.sizes[NUM_COLOURS]):
                mine = (self.tables.colour == colour)[:, None]
                load = self._load(torch.where(is_open & ~mine, each, 0), base)[self.rank]
                smaller = load[:, None, :] < load[:, :, None]
                ties = load[:, None, :] == load[:, :, None]
                ties &= self.rotated[:, None, :] < self.rotated[:, :, None]
                before = ((smaller | ties) & self.is_choice[:, None, :]).sum(2)
                is_open = torch.where(mine, (before < num_open) & self.is_choice, is_open)
        return is_open

    def _first_open(self) -> torch.Tensor:
        return self.is_open & (self.is_open.cumsum(1) == 1)

    def _descend(self, base: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
        tokens = self.tokens << self.bits
        x = ((tokens.long() * self.tables.weight) >> WEIGHT_BITS).to(torch.int32)
        x = torch.where(self.is_open, x, 0)
        x = x + torch.where(self._first_open(), tokens - x.sum(1, keepdim=True, dtype=torch.int32), 0)
        before, load = x, self._load(x, base)
        earlier, best, lowest = load, x, int(load.max())
        step = self.tables.step[:, None].long()
        for k in range(self.controls[control.ITERATIONS]):
            momentum = int(MOMENTUM[min(k, len(MOMENTUM) - 1)])
            z = x + ((momentum * (x - before)) >> 4)
            ahead = (load + ((momentum * (load - earlier)) >> 4)).clamp(min=0) + far
            bids = ((2 * ahead[self.rank].long() * step) >> 32).to(torch.int32) - z
            before, earlier = x, load
            x = self._fill(bids, tokens, exact=False).x
            load = self._load(x, base)
            if int(load.max()) < lowest:
                best, lowest = x, int(load.max())
        return best

    def _fill(self, bids: torch.Tensor, tokens: torch.Tensor, *, exact: bool) -> _Fill:
        """The level up to which each row's tokens fill its open choices; with reciprocals if not ``exact``."""
        least = torch.where(self.is_open, bids, _LARGE).amin(1, keepdim=True)
        # Above tokens + 1 no bid ever counts; cut there, sums stay in 31 bits.
        bids = torch.where(self.is_open, (bids - least).minimum(tokens + 1), tokens + 1)
        level = tokens + 1
        for _ in range(bids.shape[1]):
            below = self.is_open & (bids <= level)
            number = below.sum(1, keepdim=True).clamp(min=1)
            total = tokens.long() + torch.where(below, bids, 0).sum(1, keepdim=True)
            reciprocal = ((1 << 31) // number).clamp(max=(1 << 31) - 1)
            lower = total // number if exact else (2 * total * reciprocal) >> 32
            level = level.minimum(lower.to(torch.int32))
        return _Fill(level, bids, torch.where(self.is_open, (level - bids).clamp(min=0), 0))

    def _give_rest(self, fill: _Fill) -> torch.Tensor:
        """Whole tokens that a level leaves over, one each to choices that it reaches, in rotated order."""
        left = self.tokens - fill.x.sum(1, keepdim=True, dtype=torch.int32)
        reached = self.is_open & (fill.bids <= fill.level)
        earlier = reached[:, None, :] & (self.rotated[:, None, :] < self.rotated[:, :, None])
        return fill.x + (reached & (earlier.sum(2) < left)).to(torch.int32)

    def _round(self, x: torch.Tensor) -> torch.Tensor:
        left = (self.tokens << self.bits) - x.sum(1, keepdim=True, dtype=torch.int32)
        x = x + torch.where(self._first_open(), left, 0)
        phase = rounding_phase(len(x), self.controls[control.ROTATION]) >> (PHASE_BITS - self.bits)
        running = x.cumsum(1, dtype=torch.int32) + phase.to(torch.int32)[:, None]
        return (running >> self.bits) - ((running - x) >> self.bits)


def _each(part: torch.Tensor, number: torch.Tensor, units: int) -> torch.Tensor:
    """(M, 1) what each of ``number`` open replicas of a row costs its rank; 0 for a row without tokens."""
    return torch.where(part > 0, part // number.clamp(min=1) + units, 0).to(torch.int32)
