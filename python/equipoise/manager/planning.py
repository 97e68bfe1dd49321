"""One rebalance, planned: load windows and the present placement in; Skip, Reweight or Migrate out. Pure.

Everything that travels to the other ranks is here as plain arrays, so they need not plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from equipoise.algorithms.problem import DispatchKind
from equipoise.algorithms.rebalance import rebalance_experts
from equipoise.algorithms.registry import find_algorithm
from equipoise.config import EplbConfig
from equipoise.errors import InvalidInputError
from equipoise.manager.commands import Rebalance
from equipoise.manager.decision import keep_reason, skip_reason
from equipoise.manager.reports import Action, OptionalFloats, as_optional_floats, mean_of
from equipoise.placement.alignment import align_placement
from equipoise.placement.balancedness import balancedness, mean_balancedness, rank_load
from equipoise.placement.metadata import ExpertLocationMetadata, PlacementDiff
from equipoise.transfer.planning.plan import plan_transfer
from equipoise.transfer.planning.types import TransferPlan


@dataclass(frozen=True)
class Skip:
    """Nothing changes."""

    action: ClassVar[Action] = "skip"
    reason: str
    window_steps: int
    balancedness_before: OptionalFloats  # (L,), of the whole window
    rank_load_before: np.ndarray  # (L, G) tokens of the whole window
    seconds: float = 0.0  # the algorithm, if it ran
    error: str | None = None  # why planning failed, if it did


@dataclass(frozen=True)
class Reweight:
    """Every expert stays; replicas share their tokens otherwise."""

    action: ClassVar[Action] = "reweight"
    reason: str
    window_steps: int
    balancedness_before: OptionalFloats
    balancedness_after: OptionalFloats  # (L,), of the same window with the new weights
    rank_load_before: np.ndarray
    rank_load_after: np.ndarray
    dispatch_weights: np.ndarray  # (L, P) float32
    seconds: float  # the algorithm, and fitting its result to the present placement

    def placement(self, current: ExpertLocationMetadata) -> ExpertLocationMetadata:
        """The planned placement."""
        return ExpertLocationMetadata.from_physical_to_logical(
            current.physical_to_logical_map,
            current.num_logical_experts,
            current.topology,
            dispatch_weights=self.dispatch_weights,
        )


@dataclass(frozen=True)
class Migrate:
    """Experts change slots."""

    action: ClassVar[Action] = "migrate"
    reason: str
    window_steps: int
    balancedness_before: OptionalFloats
    balancedness_after: OptionalFloats  # (L,), of the same window on the new placement
    rank_load_before: np.ndarray  # (L, G)
    rank_load_after: np.ndarray
    physical_to_logical_map: np.ndarray  # (L, P) int64
    dispatch_weights: np.ndarray  # (L, P) float32
    diff: PlacementDiff  # from the present placement
    transfer: TransferPlan | None  # the way there; None where the host moves experts itself
    seconds: float
    transfer_seconds: float  # planning the transfer

    def placement(self, current: ExpertLocationMetadata) -> ExpertLocationMetadata:
        """The planned placement."""
        return ExpertLocationMetadata.from_physical_to_logical(
            self.physical_to_logical_map,
            current.num_logical_experts,
            current.topology,
            dispatch_weights=self.dispatch_weights,
        )


Plan = Skip | Reweight | Migrate


def plan_rebalance(
    windows: np.ndarray,
    current: ExpertLocationMetadata,
    config: EplbConfig,
    *,
    algorithm: str,
    request: Rebalance | None,
    window_steps: int,
    num_groups: int | None,
    max_staged_experts: int | None,
    clock: Callable[[], float],
    dispatch: DispatchKind = "weights",
) -> Plan:
    """Decides and plans.

    Args:
        windows: (W, L, E) int64, oldest first; W = 0 if nothing was recorded.
        current: the committed placement, on the CPU.
        request: the operator's, or None for a periodic rebalance.
        window_steps: steps the windows hold, for the report and for the size of a batch.
        max_staged_experts: experts a rank can stage at once; None: the host moves them, no transfer is planned.
        clock: seconds.
        dispatch: how tokens are split over replicas; what the algorithm plans for.
    """
    load = windows.sum(0) if len(windows) else np.zeros((current.num_layers, current.num_logical_experts))
    per_layer = balancedness(load, current).numpy()
    before, mean_before = as_optional_floats(per_layer), mean_balancedness(per_layer)
    loads = rank_load(load, current)
    reason = skip_reason(
        window_steps=window_steps,
        mean_balancedness=mean_before,
        threshold=config.eplb_min_rebalancing_utilization_threshold,
        requested=request is not None,
    )
    if reason is not None or mean_before is None:
        return Skip(reason or "no load", window_steps, before, loads)
    start = clock()
    try:
        planned = _solve(
            windows,
            current,
            config,
            algorithm=algorithm,
            request=request,
            num_groups=num_groups,
            dispatch=dispatch,
            tokens_per_step=max(1, round(float(load.sum(1).max()) / window_steps)),
        )
    except InvalidInputError as error:
        return Skip("planning failed", window_steps, before, loads, seconds=clock() - start, error=str(error))
    seconds = clock() - start
    return _judge(
        Skip("", window_steps, before, loads, seconds),
        load,
        current,
        planned,
        force=bool(request and request.force),
        max_staged_experts=max_staged_experts,
        clock=clock,
    )


def _solve(
    windows: np.ndarray,
    current: ExpertLocationMetadata,
    config: EplbConfig,
    *,
    algorithm: str,
    request: Rebalance | None,
    num_groups: int | None,
    dispatch: DispatchKind,
    tokens_per_step: int,
) -> ExpertLocationMetadata:
    limit = request.max_moves_per_layer if request else None
    price = request.move_price if request else None
    planned = rebalance_experts(
        windows,
        current.topology,
        algorithm=algorithm,
        current=current,
        num_groups=num_groups,
        max_moves_per_layer=limit if limit is not None else config.eplb_max_moves_per_layer,
        move_price=price if price is not None else config.eplb_move_price,
        dispatch=dispatch,
        tokens_per_step=tokens_per_step,
    )
    # Names of slots and ranks change nothing for the load, but much for what must move.
    grouped = num_groups is not None or find_algorithm(algorithm).by_nodes
    return align_placement(current, planned, relabel="nodes" if grouped else "ranks")


def _judge(
    so_far: Skip,
    load: np.ndarray,
    current: ExpertLocationMetadata,
    planned: ExpertLocationMetadata,
    *,
    force: bool,
    max_staged_experts: int | None,
    clock: Callable[[], float],
) -> Plan:
    """What to do with a placement that the algorithm proposes.

    Args:
        so_far: what is known before.
        load: (L, E), the whole window.
    """
    steps, before, seconds = so_far.window_steps, so_far.balancedness_before, so_far.seconds
    loads, loads_after = so_far.rank_load_before, rank_load(load, planned)
    per_layer = balancedness(load, planned).numpy()
    mean_before, mean_after = mean_of(before), mean_balancedness(per_layer)
    assert mean_before is not None
    assert mean_after is not None, "the same load has tokens on any placement"
    diff = current.diff(planned)
    slots_changed = int(diff.slots_changed.sum())
    gain = f"balancedness {mean_before:.3f} -> {mean_after:.3f}"
    weights = planned.dispatch_weights.numpy()
    reason = keep_reason(
        slots_changed=slots_changed,
        weights_changed=not np.array_equal(weights, current.dispatch_weights.numpy()),
        before=mean_before,
        after=mean_after,
        force=force,
    )
    if reason is not None:
        return Skip(f"{reason} ({gain})", steps, before, loads, seconds)
    after = as_optional_floats(per_layer)
    if slots_changed == 0:
        reason = f"new dispatch weights only, no expert moves ({gain})"
        return Reweight(reason, steps, before, after, loads, loads_after, weights, seconds)
    start = clock()
    transfer = None
    if max_staged_experts is not None:
        transfer = plan_transfer(current, planned, current.topology, max_staged_experts=max_staged_experts)
    return Migrate(
        f"{slots_changed} slots change ({gain})",
        steps,
        before,
        after,
        loads,
        loads_after,
        planned.physical_to_logical_map.numpy(),
        weights,
        diff,
        transfer,
        seconds,
        clock() - start,
    )
