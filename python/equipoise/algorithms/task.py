"""Task: a problem as the kernels take it, and what turns their answer into a placement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from equipoise.algorithms.forecast.risk import exponents
from equipoise.algorithms.forecast.scenarios import Scenarios, make_scenarios
from equipoise.algorithms.forecast.shrinkage import shrink_to_mean
from equipoise.algorithms.problem import PlacementProblem, Solution
from equipoise.algorithms.search.ejection_chain import eject
from equipoise.algorithms.search.layer_state import new_state
from equipoise.algorithms.search.move_price import ELSEWHERE, ON_NODE
from equipoise.jit.compile import kernel
from equipoise.jit.threads import for_each_layer
from equipoise.placement.relabel import align

NODE_PRICE = 2.5  # of a move whose weights come from another node; within a node it is 1
RISK_PRICE = 1.5  # of what normal forecast errors would cost, see layer_state.py: real ones have heavier tails
RISK_OF_KINDS = 0.5  # the same where two windows are of two kinds: what sets them apart is in the scenarios already
FEW_WINDOWS = 4  # up to which a placement may not have settled yet
SLOWEST = 1e-2  # of the fastest rank: slower ones count as this slow, so that powers of their load stay finite


class Layers(NamedTuple):
    """Load and ranks as the kernels take them."""

    experts: np.ndarray  # (L, E, S + 1), see LayerState.experts
    weight: np.ndarray  # (S,) of the scenarios
    any_load: np.ndarray  # (L,) bool
    inverse_speed: np.ndarray  # (G,) mean speed of live ranks / speed of a rank; 0 for a rank that is gone
    ranks_per_node: int
    num_groups: int  # groups of experts to keep whole on nodes, 0 for none
    peaks: bool  # scenarios are kinds of load that come back: experts that peak together are to come apart


@dataclass(frozen=True)
class Task:
    """A problem as the kernels take it."""

    problem: PlacementProblem
    old: np.ndarray  # (L, P) int64, the placement in force; contiguous if there is none
    old_share: np.ndarray  # (L, P) float64, its dispatch weights; 0 if there is none
    layers: Layers
    exponent: np.ndarray  # (L,) of the surrogate, that fits the forecast's error
    prices: np.ndarray  # (3,) of a move by where the expert was
    scenarios: Scenarios

    @classmethod
    def of(cls, problem: PlacementProblem, scenarios: Scenarios | None = None) -> Task:
        shape = (problem.num_layers, problem.topology.num_slots)
        inverse_speed = _inverse_speed(problem)
        live = int((inverse_speed > 0).sum())
        if scenarios is None:
            scenarios = make_scenarios(problem.load, float(live))
        prices = np.zeros(3)
        if problem.current is None:
            old = np.tile(np.arange(shape[1]) % problem.num_logical_experts, (shape[0], 1))
            old_share = np.zeros(shape)
        else:
            old = problem.current.physical_to_logical_map.cpu().numpy().copy()
            old_share = problem.current.dispatch_weights.cpu().numpy().astype(np.float64)
            prices[ON_NODE], prices[ELSEWHERE] = 1.0, NODE_PRICE
            if problem.dispatch == "even":  # whatever weights it has: they are not used
                counts = np.take_along_axis(problem.current.num_replicas.cpu().numpy(), old, axis=1)
                old_share = 1.0 / counts
        if problem.current is None and len(problem.load) == 1:  # nothing else to please than that window
            scenarios = scenarios._replace(noise=np.zeros_like(scenarios.noise))
        elif len(problem.load) == 1 and scenarios.error.any():
            scenarios = shrink_to_mean(scenarios)
        exponent = exponents(scenarios.mean, scenarios.noise, live * problem.topology.slots_per_rank, live)
        risk_price = RISK_OF_KINDS if scenarios.two_kinds else RISK_PRICE
        noise = scenarios.noise * (risk_price * 0.5 * (exponent[:, None] - 1.0))
        layers = Layers(
            np.concatenate([scenarios.tokens, noise[..., None]], axis=2),
            scenarios.weight,
            scenarios.any_load,
            inverse_speed,
            problem.topology.ranks_per_node,
            (problem.num_groups or 0) if problem.grouped else 0,
            scenarios.recurring,
        )
        return cls(problem, old, old_share, layers, exponent, prices, scenarios)

    @property
    def mean(self) -> np.ndarray:
        """(L, E) mean load over the scenarios."""
        return self.scenarios.mean

    @property
    def num_groups(self) -> int:
        return self.layers.num_groups

    @property
    def for_batches(self) -> bool:
        """Whether it is planned for dispatch by the batch; with expert groups it is as for planned weights."""
        return self.problem.dispatch == "batch" and not self.num_groups

    @property
    def noise_is_known(self) -> bool:
        """Whether it is known how far the forecast is off: of several windows, and of one that holds counts."""
        return self.problem.load.shape[0] > 1 or bool(self.scenarios.noise.any())

    @property
    def steady_for_long(self) -> bool:
        """Whether all windows differ by counting noise alone, and there are more than :data:`FEW_WINDOWS`."""
        return self.scenarios.steady and self.problem.load.shape[0] > FEW_WINDOWS

    def take(self, chosen: np.ndarray) -> Task:
        """The same for the layers ``chosen``, ascending, alone."""
        if len(chosen) == len(self.old):
            return self
        layers, known = self.layers, self.scenarios
        any_load = known.any_load[chosen]
        return replace(
            self,
            old=self.old[chosen],
            old_share=self.old_share[chosen],
            layers=layers._replace(experts=layers.experts[chosen], any_load=any_load),
            exponent=self.exponent[chosen],
            scenarios=known._replace(
                tokens=known.tokens[chosen],
                noise=known.noise[chosen],
                error=known.error[chosen],
                mean=known.mean[chosen],
                any_load=any_load,
            ),
        )

    def at(self, placed: np.ndarray) -> Task:
        """The same with ``placed`` (L, P) in force, its replicas sharing alike."""
        return replace(self, old=placed, old_share=np.zeros(placed.shape))

    def run(self, kernel: Callable[..., None], *args: Any) -> None:
        for_each_layer(kernel, len(self.old), self.problem.num_threads, *args)

    def finish(self, placed: np.ndarray, share: np.ndarray) -> Solution:
        problem = self.problem
        keep_slots = problem.current is not None
        exact = problem.load.shape[0] == 1 and not (keep_slots and self.noise_is_known)
        if exact and problem.dispatch != "even":
            self.run(_eject_layers, placed, share, self.layers, not keep_slots and not problem.grouped)
        self.run(_finish_layers, self.old, placed, share, self.layers.inverse_speed, keep_slots)
        return Solution(placed, None if problem.dispatch == "even" else share)


def _inverse_speed(problem: PlacementProblem) -> np.ndarray:
    """(G,) mean speed of live ranks / speed of a rank; 0 for a rank that is gone."""
    capacity = problem.rank_capacity
    if capacity is None:
        return np.ones(problem.topology.num_ranks)
    live = capacity > 0
    speed = np.maximum(capacity / capacity.max(), SLOWEST)
    return np.where(live, speed[live].sum() / live.sum() / speed, 0.0)


@kernel
def _eject_layers(
    first: int, last: int, placed: np.ndarray, share: np.ndarray, layers: Layers, exchanges: bool
) -> None:
    """Makes shares those of the smallest maximum for the one window there is, in rows first..last-1, in place.

    With ``exchanges`` experts may change ranks for that: where the placement was packed from scratch.
    """
    for layer in range(first, last):
        state = new_state(placed[layer], share[layer], layers.experts[layer], layers.weight, layers.inverse_speed)
        eject(state, exchanges)


@kernel
def _finish_layers(
    first: int,
    last: int,
    old: np.ndarray,
    placed: np.ndarray,
    share: np.ndarray,
    inverse_speed: np.ndarray,
    keep_slots: bool,
) -> None:
    """Finishes rows first..last-1 of ``placed`` and ``share`` (L, P), in place; ranks that are gone get no share.

    With ``keep_slots`` an expert that stays on a rank stays in its slot.
    """
    size = placed.shape[1] // inverse_speed.shape[0]
    for layer in range(first, last):
        if keep_slots:
            align(placed[layer], share[layer], old[layer], size)
        for slot in range(placed.shape[1]):
            live = inverse_speed[slot // size] > 0.0
            share[layer, slot] = min(max(share[layer, slot], 0.0), 1.0) if live else 0.0
