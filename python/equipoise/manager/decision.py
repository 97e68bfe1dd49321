"""Whether a rebalance pays: pure decisions, each with a reason that a person can read in a log."""

from __future__ import annotations

from dataclasses import dataclass

from equipoise.manager.commands import Action


@dataclass(frozen=True)
class Decision:
    action: Action
    reason: str


def decide_to_plan(
    *, window_steps: int, mean_balancedness: float | None, threshold: float, requested: bool
) -> Decision:
    """Before planning: is there anything to plan from, and is the present balance bad enough?

    Args:
        mean_balancedness: of the window on the present placement; None if it saw no token.
        threshold: balancedness above which a periodic rebalance is skipped; does not hold back one that an operator
            requested.
    """
    if mean_balancedness is None:
        return Decision("skip", f"no token was routed in the {window_steps} recorded steps")
    if not requested and mean_balancedness > threshold:
        return Decision("skip", f"balancedness {mean_balancedness:.3f} is above the threshold {threshold:.3f}")
    return Decision("migrate", f"balancedness is {mean_balancedness:.3f} over {window_steps} steps")


def decide_to_move(
    *, slots_changed: int, weights_changed: bool, before: float, after: float, force: bool = False
) -> Decision:
    """After planning: does the plan change anything, and for the better?

    Args:
        before, after: mean balancedness of the window on the present and on the planned placement.
        force: carry the plan out even if it does not improve the window it was made from.
    """
    gain = f"balancedness {before:.3f} -> {after:.3f}"
    if slots_changed == 0 and not weights_changed:
        return Decision("skip", f"the plan equals the present placement ({gain})")
    if after <= before and not force:
        return Decision("skip", f"the plan would change {slots_changed} slots and gain nothing ({gain})")
    if slots_changed == 0:
        return Decision("reweight", f"new dispatch weights only, no expert moves ({gain})")
    return Decision("migrate", f"{slots_changed} slots change ({gain})")
