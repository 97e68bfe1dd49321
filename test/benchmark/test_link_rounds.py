"""The benchmark's count of rounds, on sets of messages where the answer is plain."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PATH = Path(__file__).resolve().parents[2] / "benchmark" / "link_rounds.py"
spec = importlib.util.spec_from_file_location("link_rounds", PATH)
link_rounds = importlib.util.module_from_spec(spec)
spec.loader.exec_module(link_rounds)


def posted(*messages):
    """Per rank a list of messages from (batch, source, destination), two tensors per expert."""
    ranks = [[], [], []]
    for batch, source, destination in messages:
        for _ in range(2):
            ranks[source].append({"batch": batch, "sent": True, "peer": destination, "num_bytes": 1})
            ranks[destination].append({"batch": batch, "sent": False, "peer": source, "num_bytes": 1})
    return ranks


def test_a_ring_takes_one_round():
    assert link_rounds.count_rounds(posted((0, 0, 1), (0, 1, 2), (0, 2, 0)), 2) == 1


def test_a_busy_receiver_takes_its_degree():
    assert link_rounds.count_rounds(posted((0, 0, 2), (0, 1, 2)), 2) == 2


def test_batches_wait_for_each_other():
    assert link_rounds.count_rounds(posted((0, 0, 1), (1, 1, 0)), 2) == 2
    assert link_rounds.count_rounds(posted((0, 0, 1), (0, 1, 0)), 2) == 1


def test_nothing_takes_no_round():
    assert link_rounds.count_rounds([[], [], []], 2) == 0
