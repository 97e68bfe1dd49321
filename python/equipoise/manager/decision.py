"""Whether a rebalance pays: pure decisions, each with a reason that a person can read in a log."""

from __future__ import annotations


def skip_reason(*, window_steps: int, mean_balancedness: float | None, threshold: float, requested: bool) -> str | None:
    """Why nothing need be planned; None if something is.

    Args:
        mean_balancedness: of the window on the present placement; None if it saw no token.
        threshold: balancedness above which a periodic rebalance is skipped; does not hold back one that an operator
            requested.
    """
    if mean_balancedness is None:
        return f"no token was routed in the {window_steps} recorded steps"
    if not requested and mean_balancedness > threshold:
        return f"balancedness {mean_balancedness:.3f} is above the threshold {threshold:.3f}"
    return None


def keep_reason(
    *, slots_changed: int, weights_changed: bool, before: float, after: float, force: bool = False
) -> str | None:
    """Why the present placement is kept although another one was planned; None if it is not.

    Args:
        before, after: mean balancedness of the window on the present and on the planned placement.
        force: carry the plan out even if it does not improve the window it was made from.
    """
    if slots_changed == 0 and not weights_changed:
        return "the plan equals the present placement"
    if after <= before and not force:
        return f"the plan would change {slots_changed} slots and gain nothing"
    return None
