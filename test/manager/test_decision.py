from equipoise.manager.decision import decide_to_move, decide_to_plan


def test_a_periodic_rebalance_is_held_back_above_the_threshold_a_requested_one_is_not() -> None:
    facts = {"window_steps": 5, "mean_balancedness": 0.9, "threshold": 0.8}
    skipped = decide_to_plan(**facts, requested=False)
    assert skipped.action == "skip"
    assert "0.900 is above the threshold 0.800" in skipped.reason
    assert decide_to_plan(**facts, requested=True).action == "migrate"
    assert decide_to_plan(window_steps=5, mean_balancedness=0.7, threshold=0.8, requested=False).action == "migrate"


def test_no_token_no_plan() -> None:
    decision = decide_to_plan(window_steps=3, mean_balancedness=None, threshold=1.0, requested=True)
    assert decision.action == "skip"
    assert "no token" in decision.reason


def test_a_plan_is_carried_out_only_if_it_changes_something_for_the_better() -> None:
    def action(slots: int, weights: bool, before: float, after: float, force: bool = False) -> str:
        return decide_to_move(
            slots_changed=slots, weights_changed=weights, before=before, after=after, force=force
        ).action

    assert action(0, False, 0.5, 0.5) == "skip"
    assert action(0, True, 0.5, 0.6) == "reweight"
    assert action(4, True, 0.5, 0.6) == "migrate"
    assert action(4, True, 0.6, 0.6) == "skip"
    assert action(4, True, 0.6, 0.5, force=True) == "migrate"
    assert action(0, False, 0.6, 0.6, force=True) == "skip"
