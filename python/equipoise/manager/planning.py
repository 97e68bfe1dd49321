"""One rebalance, planned: load windows and the present placement in, a decision and a new placement out. Pure.

Runs on rank 0 beside the forward passes; the result is a plain value that is broadcast to the other ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from equipoise.algorithms.rebalance import rebalance_experts
from equipoise.algorithms.registry import find_algorithm
from equipoise.config import EplbConfig
from equipoise.errors import InvalidInputError
from equipoise.manager.commands import Rebalance
from equipoise.manager.decision import Decision, decide_to_move, decide_to_plan
from equipoise.placement.alignment import align_placement
from equipoise.placement.balancedness import balancedness, mean_balancedness
from equipoise.placement.metadata import ExpertLocationMetadata, PlacementDiff
from equipoise.transfer.planning.plan import plan_transfer
from equipoise.transfer.planning.types import TransferPlan


@dataclass(frozen=True)
class PlannedRebalance:
    """A decision and, unless it is to skip, the placement to migrate to."""

    decision: Decision
    window_steps: int
    balancedness_before: list[float | None]  # (L,), of the whole window
    balancedness_after: list[float | None]  # (L,), of the same window on the new placement
    physical_to_logical_map: np.ndarray | None  # (L, P) int64
    dispatch_weights: np.ndarray | None  # (L, P) float32
    diff: PlacementDiff | None  # from the present placement
    transfer: TransferPlan | None  # the way there; None if no expert moves
    seconds: float  # the algorithm, and fitting its result to the present placement
    transfer_seconds: float  # planning the transfer
    error: str | None = None

    def placement(self, like: ExpertLocationMetadata) -> ExpertLocationMetadata:
        """The new placement as metadata of the same shape as ``like``."""
        assert self.physical_to_logical_map is not None, "a skipped rebalance has no placement"
        return ExpertLocationMetadata.from_physical_to_logical(
            self.physical_to_logical_map,
            like.num_logical_experts,
            like.topology,
            dispatch_weights=self.dispatch_weights,
        )


def plan_rebalance(
    windows: np.ndarray,
    current: ExpertLocationMetadata,
    config: EplbConfig,
    *,
    algorithm: str,
    request: Rebalance | None,
    window_steps: int,
    num_groups: int | None,
    max_staged_experts: int,
    clock: Callable[[], float],
) -> PlannedRebalance:
    """Decides and plans.

    Args:
        windows: (W, L, E) int64, oldest first; W = 0 if nothing was recorded.
        current: the committed placement, on the CPU.
        request: the operator's, or None for a periodic rebalance.
        window_steps: steps the windows hold, for the report.
        max_staged_experts: experts a rank can stage at once.
        clock: seconds.
    """
    load = windows.sum(0) if len(windows) else np.zeros((current.num_layers, current.num_logical_experts))
    before = balancedness(load, current).numpy()
    mean_before = mean_balancedness(before)

    def result(decision: Decision, after: np.ndarray, **found: object) -> PlannedRebalance:
        nothing = {"physical_to_logical_map": None, "dispatch_weights": None, "diff": None, "transfer": None}
        values = {**nothing, "seconds": 0.0, "transfer_seconds": 0.0, **found}
        return PlannedRebalance(
            decision=decision,
            window_steps=window_steps,
            balancedness_before=as_optional_floats(before),
            balancedness_after=as_optional_floats(after),
            **values,  # type: ignore[arg-type]
        )

    decision = decide_to_plan(
        window_steps=window_steps,
        mean_balancedness=mean_before,
        threshold=config.eplb_min_rebalancing_utilization_threshold,
        requested=request is not None,
    )
    if decision.action == "skip" or mean_before is None:
        return result(decision, before)
    limit = request.max_moves_per_layer if request else None
    price = request.move_price if request else None
    start = clock()
    try:
        planned = rebalance_experts(
            windows,
            current.topology,
            algorithm=algorithm,
            current=current,
            num_groups=num_groups,
            max_moves_per_layer=limit if limit is not None else config.eplb_max_moves_per_layer,
            move_price=price if price is not None else config.eplb_move_price,
        )
    except InvalidInputError as error:
        return result(Decision("skip", "planning failed"), before, error=str(error), seconds=clock() - start)
    # Names of slots and ranks change nothing for the load, but much for what must move.
    grouped = num_groups is not None or find_algorithm(algorithm).by_nodes
    planned = align_placement(current, planned, relabel="nodes" if grouped else "ranks")
    seconds = clock() - start
    after = balancedness(load, planned).numpy()
    mean_after = mean_balancedness(after)
    assert mean_after is not None, "the same load has tokens on any placement"
    diff = current.diff(planned)
    move = decide_to_move(
        slots_changed=int(diff.slots_changed.sum()),
        weights_changed=not np.array_equal(planned.dispatch_weights, current.dispatch_weights),
        before=mean_before,
        after=mean_after,
        force=bool(request and request.force),
    )
    start = clock()
    transfer = None
    if move.action == "migrate":
        transfer = plan_transfer(current, planned, current.topology, max_staged_experts=max_staged_experts)
    return result(
        move,
        after,
        physical_to_logical_map=planned.physical_to_logical_map.numpy(),
        dispatch_weights=planned.dispatch_weights.numpy(),
        diff=diff,
        transfer=transfer,
        seconds=seconds,
        transfer_seconds=clock() - start,
    )


def as_optional_floats(values: np.ndarray) -> list[float | None]:
    """NaN, which JSON has not, becomes None."""
    return [None if np.isnan(value) else float(value) for value in values]
