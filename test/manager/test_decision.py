from equipoise.manager.decision import keep_reason, skip_reason


def test_a_periodic_rebalance_is_held_back_above_the_threshold_a_requested_one_is_not() -> None:
    facts = {"window_steps": 5, "mean_balancedness": 0.9, "threshold": 0.8}
    assert "0.900 is above the threshold 0.800" in str(skip_reason(**facts, requested=False))
    assert skip_reason(**facts, requested=True) is None
    assert skip_reason(window_steps=5, mean_balancedness=0.7, threshold=0.8, requested=False) is None


def test_no_token_no_plan() -> None:
    reason = skip_reason(window_steps=3, mean_balancedness=None, threshold=1.0, requested=True)
    assert "no token" in str(reason)


def test_a_plan_is_carried_out_only_if_it_changes_something_for_the_better() -> None:
    def kept(slots: int, weights: bool, before: float, after: float, force: bool = False) -> bool:
        reason = keep_reason(slots_changed=slots, weights_changed=weights, before=before, after=after, force=force)
        return reason is not None

    assert kept(0, False, 0.5, 0.5)
    assert not kept(0, True, 0.5, 0.6)
    assert not kept(4, True, 0.5, 0.6)
    assert kept(4, True, 0.6, 0.6)
    assert not kept(4, True, 0.6, 0.5, force=True)
    assert kept(0, False, 0.6, 0.6, force=True)
