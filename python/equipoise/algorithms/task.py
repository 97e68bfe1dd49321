"""Task: a problem as the kernels take it, and what turns their answer into a placement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from equipoise.algorithms.forecast.risk import exponents
from equipoise.algorithms.forecast.scenarios import Scenarios, make_scenarios, mean_load
from equipoise.algorithms.problem import Placement, PlacementProblem
from equipoise.algorithms.search.connect import connect
from equipoise.algorithms.search.layer_state import new_state
from equipoise.algorithms.search.move_price import ELSEWHERE, ON_NODE
from equipoise.jit.compile import kernel
from equipoise.jit.threads import for_each_layer
from equipoise.placement.relabel import align

NODE_PRICE = 2.5  # of a move whose weights come from another node; within a node it is 1
RISK_PRICE = 1.5  # of what normal forecast errors would cost, see layer_state.py: real ones have heavier tails
SLOWEST = 1e-2  # of the fastest rank: slower ones count as this slow, so that powers of their load stay finite


@dataclass(frozen=True)
class Task:
    """A problem as the kernels take it."""

    problem: PlacementProblem
    old: np.ndarray  # (L, P) int64, the placement in force; contiguous if there is none
    old_share: np.ndarray  # (L, P) float64, its dispatch weights; 0 if there is none
    experts: np.ndarray  # (L, E, S + 1), see LayerState.experts
    weight: np.ndarray  # (S,) of the scenarios
    any_load: np.ndarray  # (L,) bool
    slowness: np.ndarray  # (G,) mean speed of live ranks / speed of a rank; 0 for a rank that is gone
    exponent: np.ndarray  # (L,) of the soft maximum, that fits the forecast's error
    prices: np.ndarray  # (3,) of a move by where the expert was

    @classmethod
    def of(cls, problem: PlacementProblem, scenarios: Scenarios | None = None) -> Task:
        shape = (problem.num_layers, problem.topology.num_slots)
        slowness = _slowness(problem)
        if scenarios is None:
            scenarios = make_scenarios(problem.load, float((slowness > 0).sum()))
        prices = np.zeros(3)
        if problem.current is None:
            old = np.tile(np.arange(shape[1]) % problem.num_logical_experts, (shape[0], 1))
            old_share = np.zeros(shape)
        else:
            old = problem.current.physical_to_logical_map.cpu().numpy().copy()
            old_share = problem.current.dispatch_weights.cpu().numpy().astype(np.float64)
            prices[ON_NODE], prices[ELSEWHERE] = 1.0, NODE_PRICE
        live = int((slowness > 0).sum())
        mean = mean_load(scenarios.tokens, scenarios.weight)
        exponent = exponents(mean, scenarios.noise, live * problem.topology.slots_per_rank, live)
        noise = scenarios.noise * (RISK_PRICE * 0.5 * (exponent[:, None] - 1.0))
        experts = np.concatenate([scenarios.tokens, noise[..., None]], axis=2)
        return cls(problem, old, old_share, experts, scenarios.weight, scenarios.any_load, slowness, exponent, prices)

    @property
    def shape(self) -> tuple[int, int]:
        """Ranks per node, and the number of groups to keep whole, 0 for none."""
        groups = self.problem.num_groups if self.problem.grouped else None
        return self.problem.topology.ranks_per_node, groups or 0

    def take(self, layers: np.ndarray) -> Task:
        return replace(
            self,
            old=self.old[layers],
            old_share=self.old_share[layers],
            experts=self.experts[layers],
            exponent=self.exponent[layers],
            any_load=self.any_load[layers],
        )

    def run(self, kernel: Callable[..., None], *args: Any) -> None:
        for_each_layer(kernel, len(self.old), self.problem.num_threads, *args)

    def finish(self, placed: np.ndarray, share: np.ndarray) -> Placement:
        problem = self.problem
        keep_slots, exact = problem.current is not None, problem.load.shape[0] == 1
        exchanges = not keep_slots and not problem.grouped
        arrays = (self.old, placed, share, self.experts, self.weight, self.slowness)
        self.run(_finish_layers, *arrays, keep_slots, exact, exchanges)
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
def _finish_layers(
    first: int,
    last: int,
    old: np.ndarray,
    placed: np.ndarray,
    share: np.ndarray,
    experts: np.ndarray,
    weight: np.ndarray,
    slowness: np.ndarray,
    keep_slots: bool,
    exact: bool,
    exchanges: bool,
) -> None:
    """Makes shares exact for a single window, puts experts that stay on a rank into their old slots, and cleans up.

    With ``exchanges`` experts may change places for that: where the placement comes from nothing.
    """
    size = placed.shape[1] // slowness.shape[0]
    for layer in range(first, last):
        if exact:
            connect(new_state(placed[layer], share[layer], experts[layer], weight, slowness), exchanges)
        if keep_slots:
            align(placed[layer], share[layer], old[layer], size)
        for slot in range(placed.shape[1]):
            live = slowness[slot // size] > 0.0
            share[layer, slot] = min(max(share[layer, slot], 0.0), 1.0) if live else 0.0
