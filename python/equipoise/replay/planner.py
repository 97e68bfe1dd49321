"""The manager's decision and plan, as a replay uses them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from equipoise.algorithms.problem import DispatchKind
from equipoise.config import EplbConfig
from equipoise.errors import EquipoiseError
from equipoise.manager.commands import Rebalance
from equipoise.manager.planning import Migrate, Reweight, Skip, plan_rebalance
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.transfer.planning.types import TransferPlan


@dataclass(frozen=True)
class Proposal:
    """What a rebalance decided: a target and the way there, or a reason to stay."""

    action: Literal["skip", "reweight", "migrate"]
    reason: str
    target: ExpertLocationMetadata | None
    transfer: TransferPlan | None
    slots_changed: int
    seconds: float


def propose(
    windows: np.ndarray,
    current: ExpertLocationMetadata,
    config: EplbConfig,
    *,
    request: Rebalance | None,
    window_steps: int,
    num_groups: int | None,
    max_staged_experts: int,
    clock: Callable[[], float],
    dispatch: DispatchKind,
) -> Proposal:
    """Calls :func:`~equipoise.manager.planning.plan_rebalance`; see there.

    Raises:
        EquipoiseError: the algorithm could not plan.
    """
    plan = plan_rebalance(
        windows,
        current,
        config,
        algorithm=config.eplb_algorithm,
        request=request,
        window_steps=window_steps,
        num_groups=num_groups,
        max_staged_experts=max_staged_experts,
        clock=clock,
        dispatch=dispatch,
    )
    match plan:
        case Skip():
            if plan.error is not None:
                raise EquipoiseError(f"algorithm {config.eplb_algorithm!r} cannot plan here: {plan.error}")
            return Proposal("skip", plan.reason, None, None, 0, plan.seconds)
        case Reweight():
            return Proposal("reweight", plan.reason, plan.placement(current), None, 0, plan.seconds)
        case Migrate():
            changed = int(plan.diff.slots_changed.sum())
            return Proposal("migrate", plan.reason, plan.placement(current), plan.transfer, changed, plan.seconds)
