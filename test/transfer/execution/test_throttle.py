import pytest

from equipoise.transfer.execution.pipeline import Throttle


def test_a_rest_is_the_share_that_the_duty_leaves() -> None:
    rests: list[float] = []
    pace = Throttle(0.25, rests.append)
    pace.rest(1000, 1.0)
    pace.rest(500, 0.5)
    assert rests == pytest.approx([3.0, 1.5])


def test_waiting_for_a_peer_that_rests_does_not_lengthen_the_rest() -> None:
    """Two ranks whose rounds end together, one of them late at first: rests must not feed on each other."""
    rests: dict[int, list[float]] = {0: [], 1: []}
    paces = {rank: Throttle(0.2, rests[rank].append) for rank in rests}
    free_at = {0: 0.0, 1: 5.0}  # seconds; rank 1 comes late
    for _ in range(50):
        end = max(free_at.values()) + 0.01
        for rank, pace in paces.items():
            pace.rest(1_000_000, end - free_at[rank])
            free_at[rank] = end + rests[rank][-1]
    assert max(rests[0][-1], rests[1][-1]) == pytest.approx(0.04)


def test_full_duty_never_rests() -> None:
    Throttle(1.0, lambda seconds: pytest.fail(f"rested {seconds} s")).rest(1000, 1.0)
