import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise import EpTopology, ExpertLocationMetadata
from equipoise.errors import PlacementError

TOPOLOGY = EpTopology(4, 2, 3)  # 12 slots


@st.composite
def placements(draw: st.DrawFn) -> tuple[np.ndarray, int, EpTopology]:
    """A random valid map (L, P), its number of experts and its topology."""
    topology = EpTopology(draw(st.sampled_from([1, 2, 4])), 1, draw(st.integers(1, 5)))
    num_experts = draw(st.integers(1, topology.num_slots))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        extra = rng.integers(0, num_experts, topology.num_slots - num_experts)
        rows.append(rng.permutation(np.concatenate([np.arange(num_experts), extra])))
    return np.stack(rows), num_experts, topology


@given(placements())
@settings(deadline=None)
def test_the_inverse_lists_exactly_the_slots_of_each_expert(case: tuple[np.ndarray, int, EpTopology]) -> None:
    p2l, num_experts, topology = case
    metadata = ExpertLocationMetadata.from_physical_to_logical(p2l, num_experts, topology)
    metadata.check_integrity()
    for layer, row in enumerate(p2l):
        for expert in range(num_experts):
            slots = np.flatnonzero(row == expert).tolist()
            padding = [-1] * (metadata.max_replicas - len(slots))
            assert metadata.logical_to_physical_map[layer, expert].tolist() == slots + padding
            assert metadata.num_replicas[layer, expert] == len(slots)
            assert metadata.dispatch_weights[layer, slots].sum().item() == pytest.approx(1)
            assert metadata.dispatch_cdf[layer, expert, len(slots) - 1] == 1


@given(placements(), st.data())
@settings(deadline=None)
def test_update_in_place_equals_a_fresh_build_and_keeps_addresses(
    case: tuple[np.ndarray, int, EpTopology], data: st.DataObject
) -> None:
    p2l, num_experts, topology = case
    room = topology.num_slots - num_experts + 1
    live = ExpertLocationMetadata.trivial(len(p2l), num_experts, topology, max_replicas=room)
    before = live.clone()
    new = ExpertLocationMetadata.from_physical_to_logical(p2l, num_experts, topology)
    layers = data.draw(st.lists(st.sampled_from(range(len(p2l))), unique=True))
    names = ["physical_to_logical_map", "logical_to_physical_map", "num_replicas", "dispatch_weights", "dispatch_cdf"]
    addresses = [getattr(live, name).data_ptr() for name in names]
    live.update_layers_(new, layers)
    live.check_integrity()
    assert [getattr(live, name).data_ptr() for name in names] == addresses
    for layer in range(len(p2l)):
        expected = p2l[layer].tolist() if layer in layers else before.physical_to_logical_map[layer].tolist()
        assert live.physical_to_logical_map[layer].tolist() == expected


@given(placements())
@settings(deadline=None)
def test_one_layer_can_be_set_to_a_map_of_its_own(case: tuple[np.ndarray, int, EpTopology]) -> None:
    p2l, num_experts, topology = case
    live = ExpertLocationMetadata.trivial(2, num_experts, topology, max_replicas=topology.num_slots - num_experts + 1)
    first = live.physical_to_logical_map[0].clone()
    live.update_layer_(1, p2l[0])
    live.check_integrity()
    assert live.physical_to_logical_map[1].tolist() == p2l[0].tolist()
    assert torch.equal(live.physical_to_logical_map[0], first)


def test_diff_counts_changed_moved_and_crossing_slots() -> None:
    old = ExpertLocationMetadata.from_physical_to_logical([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]], 12, TOPOLOGY)
    # slots 0, 1 swap inside rank 0; slots 2, 3 swap between ranks of node 0; slots 5, 6 swap between nodes
    new = ExpertLocationMetadata.from_physical_to_logical([[1, 0, 3, 2, 4, 6, 5, 7, 8, 9, 10, 11]], 12, TOPOLOGY)
    diff = old.diff(new)
    assert diff.layers == [0]
    assert (diff.slots_changed[0], diff.moves[0], diff.cross_node_moves[0]) == (6, 4, 2)


@pytest.mark.parametrize(
    ("p2l", "message"),
    [
        ([[0] * 12], r"misses experts \[1, 2, .*layer 0"),
        ([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12]], r"\[0\]\[11\] is 12, outside \[0, 12\)"),
        ([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, -1]], r"is -1, outside"),
        ([[0, 1, 2]], r"must have shape \(layers, 12\).*got \(1, 3\)"),
        ([[0.5] * 12], "must hold integers"),
    ],
)
def test_a_bad_map_is_named(p2l: list, message: str) -> None:
    with pytest.raises(PlacementError, match=message) as caught:
        ExpertLocationMetadata.from_physical_to_logical(p2l, 12, TOPOLOGY)
    assert caught.value.field == "physical_to_logical_map"


def test_bad_weights_are_named() -> None:
    row = [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]]
    weights = np.ones((1, 12))
    with pytest.raises(PlacementError, match="expert 0 in layer 0 sum to 2"):
        ExpertLocationMetadata.from_physical_to_logical(row, 10, TOPOLOGY, dispatch_weights=weights)
    weights[0, 3] = np.nan
    with pytest.raises(PlacementError, match=r"dispatch_weights\[0\]\[3\] is nan"):
        ExpertLocationMetadata.from_physical_to_logical(row, 10, TOPOLOGY, dispatch_weights=weights)


def test_integrity_check_prints_both_sides() -> None:
    metadata = ExpertLocationMetadata.trivial(2, 10, TOPOLOGY)
    metadata.num_replicas[1, 0] = 7
    with pytest.raises(
        PlacementError, match=r"num_replicas disagrees .* in layer 1: it holds \[7, 2, .*gives \[2, 2, "
    ):
        metadata.check_integrity()


def test_fewer_replicas_leave_nothing_of_the_many_before() -> None:
    live = ExpertLocationMetadata.trivial(1, 7, TOPOLOGY, max_replicas=6)
    crowded = ExpertLocationMetadata.from_physical_to_logical([[0, 1, 2, 3, 4, 5, 6, 0, 0, 0, 0, 0]], 7, TOPOLOGY)
    spread = ExpertLocationMetadata.from_physical_to_logical([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]], 7, TOPOLOGY)
    for placement in (crowded, spread):
        live.update_layers_(placement, [0])
        live.check_integrity()


def test_an_update_that_does_not_fit_changes_nothing() -> None:
    live = ExpertLocationMetadata.trivial(1, 10, TOPOLOGY, max_replicas=2)
    crowded = ExpertLocationMetadata.from_physical_to_logical([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0]], 10, TOPOLOGY)
    before = live.physical_to_logical_map.clone()
    with pytest.raises(PlacementError, match="3 replicas .* max_replicas=2"):
        live.update_layers_(crowded, [0])
    assert torch.equal(live.physical_to_logical_map, before)
    live.check_integrity()
