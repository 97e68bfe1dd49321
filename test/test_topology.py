import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise import EpTopology
from equipoise.errors import ConfigError


def test_the_worked_number() -> None:
    topology = EpTopology.for_experts(256, 32, num_ranks=32, num_nodes=4)
    assert (topology.num_slots, topology.slots_per_rank, topology.ranks_per_node, topology.slots_per_node) == (
        288,
        9,
        8,
        72,
    )


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9))
def test_slots_ranks_and_nodes_agree(nodes: int, ranks_per_node: int, slots: int) -> None:
    topology = EpTopology(nodes * ranks_per_node, nodes, slots)
    seen = []
    for node in range(nodes):
        for rank in topology.ranks_of_node(node):
            assert topology.node_of_rank(rank) == node
            for local, slot in enumerate(topology.slots_of_rank(rank)):
                assert (topology.rank_of_slot(slot), topology.local_slot(slot)) == (rank, local)
                assert topology.node_of_slot(slot) == node
                seen.append(slot)
    assert seen == list(range(topology.num_slots))


@pytest.mark.parametrize(
    ("args", "field"),
    [
        ((0, 1, 1), "num_ranks"),
        ((4, 3, 1), "num_nodes"),
        ((4, 2, -1), "slots_per_rank"),
        ((True, 1, 1), "num_ranks"),
        ((np.True_, 1, 1), "num_ranks"),
        ((4, 2.0, 1), "num_nodes"),
        ((4, 2, np.float64(3)), "slots_per_rank"),
    ],
)
def test_bad_numbers_are_named(args: tuple[int, int, int], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EpTopology(*args)
    assert caught.value.field == field
    assert field in str(caught.value)


def test_numpy_integers_are_taken_as_integers() -> None:
    topology = EpTopology(np.int8(64), np.uint8(8), np.int64(9))
    assert topology == EpTopology(64, 8, 9)
    assert (topology.num_slots, json.dumps(topology.num_slots)) == (576, "576")
    assert EpTopology.for_experts(np.int8(64), np.int8(64), np.int8(32)) == EpTopology(32, 1, 4)
    with pytest.raises(ConfigError, match=r"num_redundant_experts must be an integer, got 64\.0"):
        EpTopology.for_experts(64, 64.0, 32)  # type: ignore[arg-type]


def test_slots_that_do_not_divide_name_the_nearest_count_that_does() -> None:
    with pytest.raises(ConfigError, match=r"60 logical \+ 5 redundant = 65 slots on num_ranks=8.*redundant_experts=12"):
        EpTopology.for_experts(60, 5, num_ranks=8)


def test_live_ranks_are_numbers_of_ranks() -> None:
    topology = EpTopology(4, 2, 3)
    assert topology.live_mask(None).tolist() == [True] * 4
    assert topology.live_mask({3, np.int64(1)}).tolist() == [False, True, False, True]


@pytest.mark.parametrize("live", [[], [4], [-1], [True, False, True, True], [0.0, 1.0], ["0"]])
def test_live_ranks_that_cannot_be_are_refused(live: list[int]) -> None:
    with pytest.raises(ConfigError, match="live_ranks must be") as caught:
        EpTopology(4, 2, 3).live_mask(live)
    assert caught.value.field == "live_ranks"
